"""Exports are proven by the programs that load them: PEFT and Transformers without this package, llama.cpp."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.adapters.packing import GROUP_SIZE, dequantize_groups, pack, quantize_groups, unpack
from lsr_scale.adapters.save_and_load import load_adapter, save_adapter
from lsr_scale.cli import main
from lsr_scale.exporting import export, merge, open_adapter, verify
from lsr_scale.exporting.gguf_file import from_rotary_order, to_rotary_order
from lsr_scale.exporting.pairs import truncate
from lsr_scale.exporting.verify import compare, in_float32
from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized
from lsr_scale.model import builtin, load_base, quantization_config, resolve
from tests.adapters.test_save_and_load import StandInTrainer
from tests.fuzz_adapters import fuzz
from tests.helpers.smollm2 import smollm2_tokenizer
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize
from tests.helpers.tiny_runs import do, save_llama, tiny_run

OPTIONS = {
    "lsr": {"rank": 4, "separation_rank": 3, "rank_pattern": {"o_proj": 6}},
    "kron_lora": {"rank": 4, "left_out": 4, "alpha_pattern": {"layers.1.mlp.up_proj": 7.0}},
    "krona": {"left_in_pattern": {"down_proj": 2}},
    "kadaptation": {"rank": 2, "phm_dim": 4, "alpha": 4.0},
    "lora_xs": {"rank": 4, "rank_pattern": {"o_proj": 6}},
    "slora": {"rank": 4, "init": "nystrom", "rank_pattern": {"o_proj": 6}},
    "lora": {"rank": 4, "use_rslora": True, "rank_pattern": {"o_proj": 6}},
}
LOW_RANK = [name for name, method in sorted(METHODS.items()) if method.is_low_rank()]
IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(5))


def silent(text):
    del text


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


def adapted(base_folder, method="lsr", seed=1, quantization="none", scale=0.3, **options):
    base = load_base(str(base_folder), quantization=quantization, dtype="bfloat16")
    values = {"target_modules": SEVEN_LINEARS, **OPTIONS[method], **options}
    return randomize(get_peft_model(base, peft_config(method, values, "CAUSAL_LM")), seed, scale).eval()


def saved(base_folder, folder, *args, **options):
    save_adapter(StandInTrainer(adapted(base_folder, *args, **options)), folder)
    return folder


def logits(model):
    with torch.no_grad():
        return in_float32(model.eval())(IDS).logits


# one process for all programs, as it imports for seconds; a line each way for each of them
SERVER = """
import json, os, sys, traceback
reply = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    code, sys.argv[1:] = json.loads(line)
    try:
        exec(code, {})
        print(json.dumps(""), file=reply, flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), file=reply, flush=True)
"""


@pytest.fixture(scope="module")
def outside():
    """Return a function that runs a program in a process that never imports this package; it returns its logits."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)

    def run(folder, program, *arguments):
        file = folder / "logits.safetensors"
        code = (
            f"{program}\nimport sys, torch\nfrom safetensors.torch import save_file\n"
            f"ids = torch.tensor({IDS.tolist()})\n"
            "assert not any(name.split('.')[0] == 'lsr_scale' for name in sys.modules)\n"
            f"with torch.no_grad():\n    save_file({{'logits': model.eval()(ids).logits.float()}}, {str(file)!r})\n"
        )
        print(json.dumps([code, list(map(str, arguments))]), file=process.stdin, flush=True)
        assert (wrong := json.loads(process.stdout.readline())) == "", wrong
        return load_file(file)["logits"]

    yield run
    process.kill()
    process.communicate()


@pytest.mark.parametrize("method", [*LOW_RANK, "lora"])
def test_peft_alone_gives_the_logits_of_an_exported_lora(base_folder, tmp_path, outside, method):
    adapter = saved(base_folder, tmp_path / "adapter", method)
    result = export(adapter, "lora", tmp_path / "lora", say=silent)
    assert result["agreement"]["relative_error"] < 1e-5
    program = (
        "import sys, torch, peft, transformers\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).float()\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[2])"
    )
    got = outside(tmp_path, program, base_folder, tmp_path / "lora")
    wanted = logits(adapted(base_folder, method))
    without = logits(load_base(str(base_folder), quantization="none"))
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    assert (without - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_lora_of_a_quantized_base_is_verified_on_that_base(base_folder, tmp_path, quantization):
    adapter = saved(base_folder, tmp_path / "adapter", quantization=quantization)
    result = export(adapter, "lora", tmp_path / "lora", say=silent)
    assert result["agreement"]["relative_error"] < 1e-5


def test_ranks_are_those_of_the_factors(base_folder, tmp_path):
    kron = saved(base_folder, tmp_path / "kron", "kron_lora", left_in=2)
    export(kron, "lora", tmp_path / "out", verify=False, say=silent)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)  # min(2, 4) * 4
    lsr = saved(base_folder, tmp_path / "lsr")
    assert export(lsr, "lora", tmp_path / "two", verify=False, say=silent)["ranks"] == "4, 6"


@pytest.mark.parametrize("kept", [1, 3, 7, 8])
def test_truncation_is_the_best_of_its_rank_and_says_its_error(kept):
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 30), (40, 8)))
    new_down, new_up, error = truncate(down, up, kept)
    product = up @ down
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    best = left[:, :kept] * values[:kept] @ right[:kept]
    assert new_down.shape == (kept, 30)
    torch.testing.assert_close(new_up @ new_down, best)
    assert error == pytest.approx(float((best - product).norm() / product.norm()), abs=1e-12)


def test_a_truncated_export_reports_its_error(base_folder, tmp_path):
    result = export(saved(base_folder, tmp_path / "a"), "lora", tmp_path / "out", max_rank=2, dtype="bf16", say=silent)
    assert 0.1 < result["truncation error, largest"] < 1
    assert result["agreement"]["relative_error"] > 1e-3
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ].shape == (2, 48)


def test_a_lossy_export_of_a_run_reports_the_change_of_accuracy(tmp_path, capsys):
    save_llama(tmp_path / "model")
    run = do(tiny_run(tmp_path, training={"max_steps": 1}, adapter={"rank": 16})).path
    file = run / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(v.shape, generator=generator) for n, v in load_file(file).items()}, file)
    exact = export(run, "lora", tmp_path / "lora", accuracy=True, say=silent)["agreement"]["accuracy"]["questions"]
    assert (exact["questions"], exact["answered_otherwise"], exact["exported"]) == (6, 0, exact["trained"])
    assert export(run, "lora", tmp_path / "other", say=silent)["agreement"]["accuracy"] == {}
    capsys.readouterr()
    words = ["export", str(run), "--to", "lora", "--max-rank", "1"]
    assert main([*words, "--out", str(tmp_path / "logits")]) == 0
    said = capsys.readouterr()
    assert "accuracy: not compared; --accuracy scores the run's tasks" in said.out
    assert "verifying: the adapter as trained\n" in said.err
    assert "prompt 4 of 4" not in said.err, "a line a stage, not a prompt, where there is no terminal"
    assert main([*words, "--accuracy", "--out", str(tmp_path / "small")]) == 0
    assert "accuracy: questions: " in capsys.readouterr().out
    row = json.loads((tmp_path / "small" / "export.json").read_text())["agreement"]["accuracy"]["questions"]
    assert row["answered_otherwise"] > 0
    assert row["exported"] - row["trained"] == pytest.approx((row["newly_right"] - row["newly_wrong"]) / 6)
    assert "| accuracy | questions: " in (tmp_path / "small" / "README.md").read_text()
    with pytest.raises(UserError, match="names tasks"):
        export(run / "adapter", "lora", tmp_path / "none", accuracy=True, say=silent)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_that_are_dequantized_once_give_the_logits_of_those_that_are_in_every_pass(
    base_folder, monkeypatch, quantization
):
    def kinds_and_logits(room):
        monkeypatch.setattr(verify, "_room", lambda device: room)
        model = in_float32(load_base(str(base_folder), quantization=quantization, dtype="bfloat16").eval())
        with torch.no_grad():
            return {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)}, model(IDS).logits

    kinds, expected = kinds_and_logits(room=0)
    dense, got = kinds_and_logits(room=1e9)

    assert len(kinds) == 2
    assert dense == {nn.Linear}
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_layers_of_a_7b_are_truncated_by_the_svd_of_a_small_core(tmp_path, monkeypatch):
    sizes = {name: (4096, 4096) for name in ("q_proj", "o_proj")} | {
        name: (4096, 1024) for name in ("k_proj", "v_proj")
    }
    sizes |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    config = peft_config("lsr", {"target_modules": SEVEN_LINEARS, "rank": 16, "separation_rank": 16}, "CAUSAL_LM")
    (tmp_path / "adapter").mkdir()
    config.save_pretrained(tmp_path / "adapter")
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.lsr_{factor}": torch.randn(shape) * 0.1
        for layer in range(2)
        for name, size in sizes.items()
        for factor, shape in METHODS["lsr"].parameter_shapes(*size, config).items()
    }
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    seen = {"svd": set(), "qr": set()}

    def watch(name):
        decompose = getattr(torch.linalg, name)

        def watched(matrix, *args, **options):
            seen[name].add(min(matrix.shape) if name == "qr" else max(matrix.shape))
            return decompose(matrix, *args, **options)

        monkeypatch.setattr(torch.linalg, name, watched)

    watch("svd")
    watch("qr")
    export(tmp_path / "adapter", "lora", tmp_path / "out", max_rank=8, dtype="bf16", verify=False, say=silent)
    assert seen == {"svd": {16}, "qr": {16}}, "never of what is as large as a weight"
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 28


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step_or_clipped(bits):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    values[:64] = 0
    codes, scales = quantize_groups(values, bits)
    back = dequantize_groups(codes, scales, bits, 1001)
    assert torch.equal(back[:32], torch.zeros(32))
    steps = scales.float().repeat_interleave(GROUP_SIZE[bits])[:1001]
    largest = {8: 127, 4: 7}[bits]
    clipped = values.abs() > steps * (largest + 0.5)
    assert ((back - values).abs() <= steps * 0.501)[~clipped].all()
    assert (back - values).norm() / values.norm() < {8: 0.007, 4: 0.11}[bits]


def test_packing_restores_names_shapes_and_an_odd_number_of_codes():
    modules = {"a.b": {"x": torch.ones(3, 11), "y": torch.full((2,), 0.5)}, "c": {"x": -torch.ones(5, 7)}}
    back = unpack(pack(modules, 4))
    assert {name: list(value.shape) for name, value in back.items()} == {
        "base_model.model.a.b.x": [3, 11],
        "base_model.model.a.b.y": [2],
        "base_model.model.c.x": [5, 7],
    }
    for name, value in back.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".")
        torch.testing.assert_close(value, modules[module][factor], rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("bits", "largest_share", "largest_error"), [(16, 1.0, 1e-2), (8, 0.55, 0.05), (4, 0.32, 0.6)])
def test_factors_of_fewer_bits_load_with_peft_and_are_smaller(
    base_folder, tmp_path, method, bits, largest_share, largest_error
):
    adapter = saved(base_folder, tmp_path / "adapter", method, scale=0.1)
    result = export(adapter, "adapter", tmp_path / "out", bits=bits, say=silent)
    assert result["tensors, of the 16-bit factors'"] <= largest_share
    base = load_base(str(base_folder), quantization="none")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    wanted, got = logits(adapted(base_folder, method, scale=0.1)), logits(model)
    without = logits(load_base(str(base_folder), quantization="none"))
    assert (got - wanted).norm() < largest_error * (wanted - without).norm()
    again, notes = load_adapter(load_base(str(base_folder), quantization="none"), tmp_path / "out")
    assert notes == []
    assert torch.equal(logits(again), got)
    # it can be exported again: what was unpacked is an adapter like any other
    export(tmp_path / "out", "merged", tmp_path / "merged", dtype="float32", say=silent)


def test_merging_adds_updates_exactly_across_methods(base_folder, tmp_path):
    paths = [saved(base_folder, tmp_path / method, method) for method in ("lsr", "kron_lora")]
    merge(paths, [0.5, -2.0], tmp_path / "sum", say=silent)
    got, parts = open_adapter(tmp_path / "sum"), [open_adapter(path) for path in paths]
    for module in got.modules:
        down, up = got.pair(module)
        expected = sum(w * (p[1] @ p[0]) for w, p in zip((0.5, -2.0), (s.pair(module) for s in parts), strict=True))
        torch.testing.assert_close(up @ down, expected)
    assert {len(source.modules) for source in (got, *parts)} == {14}


def test_an_export_is_complete_with_its_card_or_leaves_nothing(base_folder, tmp_path, capsys):
    adapter = saved(base_folder, tmp_path / "adapter")
    assert main(["export", str(adapter), "--to", "lora", "--out", str(tmp_path / "out")]) == 0
    assert "next token the same at 100.0 % of" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "| method | lsr |" in card
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["method"] == "lsr"
    assert main(["export", str(adapter), "--to", "lora", "--out", str(tmp_path / "out")]) == 2
    assert "there is something already" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "lora", "--out", str(tmp_path / "new"), "--base", "no/such"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_base_that_is_quantized_already_is_merged_from_its_unquantized_weights(base_folder, tmp_path):
    quantizer = quantization_config("nf4", True, torch.bfloat16, ["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16, quantization_config=quantizer)
    model.save_pretrained(tmp_path / "quantized")
    adapter = saved(tmp_path / "quantized", tmp_path / "adapter", quantization="nf4")
    with pytest.raises(UserError, match=r"^--to merged: the weights of .* are quantized already, .* with --base, or "):
        export(adapter, "merged", tmp_path / "merged", say=silent)
    export(adapter, "merged", tmp_path / "merged", base=str(base_folder), say=silent)  # verified
    export(adapter, "lora", tmp_path / "lora", say=silent)


@pytest.mark.parametrize("verified", [True, False])
def test_an_export_onto_other_weights_or_settings_says_so(base_folder, tmp_path, verified):
    adapter = saved(base_folder, tmp_path / "adapter")
    said: list[str] = []
    export(adapter, "merged", tmp_path / "own", verify=verified, say=said.append)
    assert not [line for line in said if line.startswith("note: ")]
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    export(adapter, "merged", tmp_path / "merged", base=str(other), verify=verified, say=said.append)
    assert [line for line in said if line.startswith(f"note: the weights of {other} are not those that it was trained")]
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.01}
    (other / "config.json").write_text(json.dumps(config))
    export(adapter, "merged", tmp_path / "set", base=str(other), verify=verified, say=said.append)
    assert [line for line in said if line.startswith(f"note: the settings of {other} are not those of {base_folder}")]


def test_adapters_of_other_weights_are_merged_and_that_is_said(base_folder, tmp_path):
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    one, two = saved(base_folder, tmp_path / "one"), saved(other, tmp_path / "two")
    said: list[str] = []
    merge([one, two], None, tmp_path / "sum", say=said.append)
    assert f"note: {two} was trained on other weights than {one}" in said


def test_an_export_that_is_not_the_adapter_is_refused(base_folder, tmp_path, monkeypatch):
    adapter = saved(base_folder, tmp_path / "adapter")
    monkeypatch.setattr("lsr_scale.exporting.pairs.AdapterSource.scaling", lambda *_: 1.01)
    with pytest.raises(UserError, match="is not the trained one"):
        export(adapter, "lora", tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": float("nan")}, "alpha: expected a finite number"),
        ({"rank_pattern": {"(a+)+$": 3}}, "may take for ever to match"),
        ({"rank": 10**9}, "rank: expected at most 65536"),
        ({"peft_type": "LOHA"}, "is no adapter method that is known here"),
    ],
)
def test_a_configuration_that_is_not_an_adapters_is_refused(base_folder, tmp_path, change, words):
    adapter = saved(base_folder, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        open_adapter(adapter)
    shutil.rmtree(adapter)
    with pytest.raises(UserError, match="there is no adapter"):
        open_adapter(adapter)


def test_an_update_of_full_rank_is_no_lora(base_folder, tmp_path):
    adapter = saved(base_folder, tmp_path / "adapter", "krona")
    for kind in ("lora", "gguf"):
        with pytest.raises(UserError, match="full rank, so no LoRA holds them; --to adapter"):
            export(adapter, kind, tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "quantization", "dtype"),
    [("lsr", "none", "bfloat16"), ("lsr", "nf4", "float32"), ("krona", "int8", "float32")],
)
def test_transformers_alone_gives_the_logits_of_a_merged_model(
    base_folder, tmp_path, monkeypatch, method, quantization, dtype, outside
):
    monkeypatch.setattr("lsr_scale.exporting.merged.SHARD_BYTES", 30_000)  # several files, as a large model has
    adapter = saved(base_folder, tmp_path / "adapter", method, quantization=quantization)
    result = export(adapter, "merged", tmp_path / "out", dtype=dtype, say=silent)
    assert result["files"] > 2
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)"
    )
    got = outside(tmp_path, program, tmp_path / "out")
    wanted = logits(adapted(base_folder, method, quantization=quantization))
    assert (got - wanted).norm() < {"bfloat16": 2e-2, "float32": 1e-5}[dtype] * wanted.norm()


def test_a_merged_model_in_4_bits_holds_the_codes_whose_error_it_reports(base_folder, tmp_path):
    adapter = saved(base_folder, tmp_path / "adapter", quantization="nf4", scale=0.1)
    result = export(adapter, "merged", tmp_path / "out", dtype="nf4", say=silent)
    export(adapter, "merged", tmp_path / "whole", dtype="float32", verify=False, say=silent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model.config.quantization_config.load_in_4bit
    freeze_quantized(model)
    errors = []
    for name, wanted in load_file(tmp_path / "whole" / "model.safetensors").items():
        if "_proj" in name:
            got = dequantize(model.get_submodule(name.removesuffix(".weight")), torch.float32)
            errors.append(float((got - wanted).norm() / wanted.norm()))
    assert result["relative error of quantizing again, median"] == pytest.approx(sorted(errors)[7], rel=0.02)
    assert 0.01 < max(errors) < 0.15


@pytest.mark.parametrize(
    ("options", "scale", "remedy"),
    [
        ({"kind": "merged", "dtype": "bfloat16"}, 0.02, "--dtype float32"),
        ({"kind": "merged", "dtype": "float32"}, 0.02, None),
        ({"kind": "adapter", "bits": 4}, 0.02, "--bits 16"),
        ({"kind": "adapter", "bits": 16}, 0.02, None),
        ({"kind": "lora", "max_rank": 1}, 0.3, "a higher --max-rank"),
    ],
)
def test_an_export_in_which_most_of_what_was_learned_is_lost_says_so(
    base_folder, tmp_path, monkeypatch, options, scale, remedy
):
    if options["kind"] == "adapter":  # 4 bits lose less of a tiny one
        monkeypatch.setattr("lsr_scale.exporting.folder.LOST", 0.02)
    adapter, said = saved(base_folder, tmp_path / "adapter", scale=scale), []
    export(adapter, out=tmp_path / "out", say=said.append, **options)
    notes = [line for line in said if "more than half of what the adapter changes" in line]
    assert len(notes) == (remedy is not None)
    assert all(line.startswith("note: ") and f": take {remedy}, or keep the adapter" in line for line in notes)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_gguf_adapter_reads_back_as_the_pairs(base_folder, tmp_path, dtype):
    adapter = saved(base_folder, tmp_path / "adapter", "kron_lora")
    result = export(adapter, "gguf", tmp_path / "out", dtype=dtype, say=silent)
    assert result["agreement"]["relative_error"] < {"float32": 1e-5, "bf16": 5e-2}[dtype]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    assert len(tensors) == 28
    assert tensors["blk.1.attn_k.weight.lora_b"].shape.tolist() == [8, 24]


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_adapters_are_refused_in_words_or_load_unchanged(tmp_path, seed):
    counts = fuzz(60, seed, tmp_path)
    assert all(count["refused"] + count["whole"] == 10 for count in counts.values())
    assert counts["truncated"]["whole"] == 0
    assert sum(count["refused"] for count in counts.values()) > 30


def test_rotary_order_is_that_of_a_published_gguf():
    smollm2_tokenizer()  # or skip
    name = "builtin:smollm2-135m-instruct"
    with builtin.quick_reader():
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(builtin.gguf_file(name)).tensors}
    with safe_open(Path(resolve(name)) / "model.safetensors", "pt") as file:
        for module, short, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
            ours = file.get_tensor(f"model.layers.3.self_attn.{module}.weight").float()
            tensor = tensors[f"blk.3.{short}.weight"]
            theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            torch.testing.assert_close(to_rotary_order(ours, heads), theirs, rtol=2**-8, atol=1e-6)
            assert torch.equal(from_rotary_order(to_rotary_order(ours, heads), heads), ours)
            assert not torch.allclose(ours, theirs, rtol=0.1)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_adapter_that_diverged_is_not_called_the_same(value):
    logits, dead = [torch.randn(3, 7)], [torch.full((3, 7), value)]
    with pytest.raises(UserError, match="the adapter as trained gives logits that are zero or not finite"):
        compare([torch.zeros(3, 7)], dead, logits)
