"""Exports that would not be the adapter as trained are refused, and so is an option without effect."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lsr_scale import UserError
from lsr_scale.adapters import peft_config
from lsr_scale.adapters.save_and_load import load_adapter, save_adapter
from lsr_scale.cli import main
from lsr_scale.exporting import export, merge
from lsr_scale.exporting.inspect import inspect_adapter
from lsr_scale.generation.sampling import Sampling
from lsr_scale.model import load_base
from lsr_scale.run.generate import complete
from tests.exporting.test_folder import IDS, adapted, base_folder, saved, silent  # noqa: F401
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import save_classifier


def pissa(base_folder, tmp_path):  # noqa: F811
    """Return the base, the trained model of an adapter that PEFT took out of the base's weights, and its folder."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for it
    model.save_pretrained(tmp_path / "begun")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    return base, model.eval(), tmp_path / "trained"


def test_lora_that_took_weights_out_of_the_base_is_refused_and_the_advice_works(base_folder, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    base, model, folder = pissa(base_folder, tmp_path)
    words = "init_lora_weights: pissa changes the base's weights.*path_initial_model_for_weight_conversion"
    for do in (
        lambda: export(folder, "lora", tmp_path / "out", base=str(base_folder), say=silent),
        lambda: export(folder, "merged", tmp_path / "out", base=str(base_folder), verify=False, say=silent),
        lambda: merge([folder, folder], None, tmp_path / "out", say=silent),
        lambda: load_adapter(load_base(str(base_folder), quantization="none"), folder),
    ):
        with pytest.raises(UserError, match=words):
            do()
    assert not (tmp_path / "out").exists()
    assert inspect_adapter(folder)["method"] == "lora"
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        before = base(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "own", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    export(tmp_path / "own", "lora", tmp_path / "out", base=str(base_folder), say=silent)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(input_ids=IDS).logits
    assert (found - trained).norm() < 1e-3 * (trained - before).norm()


def test_a_base_that_loading_changes_is_no_measure(base_folder, tmp_path, monkeypatch):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter")

    def load_and_spoil(base, folder):
        with torch.no_grad():
            base.model.embed_tokens.weight.data = base.model.embed_tokens.weight.data * 1.01
        return load_adapter(base, folder)

    monkeypatch.setattr("lsr_scale.exporting.verify.load_adapter", load_and_spoil)
    with pytest.raises(UserError, match="changes the base's own weights; nothing was exported"):
        export(adapter, "lora", tmp_path / "out", say=silent)


@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        ("lora", {"dtype": "float16"}, 1e5),
        ("gguf", {"dtype": "float16"}, 1e5),
        ("adapter", {}, 1e5),
        ("adapter", {"bits": 8}, 1e9),
        ("adapter", {"bits": 4}, 1e7),
    ],
)
def test_values_beyond_the_type_are_counted_and_refused(base_folder, tmp_path, kind, options, value):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter", "lora", use_rslora=False, rank_pattern={})
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    tensors[name][0, :3] = value
    if kind == "adapter" and options:
        adapter = saved(base_folder, tmp_path / "lsr")
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors[max(tensors, key=lambda one: tensors[one].numel())].view(-1)[:3] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r": 3 of [\d,]+ values are beyond float16.*--to lora --dtype float32"):
        export(adapter, kind, tmp_path / "out", verify=False, say=silent, **options)
    assert not (tmp_path / "out").exists()
    export(adapter, "lora", tmp_path / "out", dtype="float32", verify=False, say=silent)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "lora", "--bits", "16"], "--bits 16: has no effect with --to lora; leave it out"),
        (["--to", "merged", "--bits", "4"], "--bits 4: has no effect with --to merged"),
        (["--to", "adapter", "--max-rank", "4"], "--max-rank 4: has no effect with --to adapter"),
        (["--to", "merged", "--max-rank", "4"], "--max-rank 4: has no effect with --to merged"),
        (["--to", "gguf", "--merged", "--max-rank", "4"], "--max-rank 4: has no effect with --to gguf --merged"),
        (["--to", "adapter", "--dtype", "float16"], "--dtype float16: has no effect with --to adapter"),
        (["--to", "gguf", "--base-gguf", "x"], "--base-gguf x: has no effect with --to gguf; leave it out"),
        (["--to", "lora", "--base-gguf", "x"], "--base-gguf x: has no effect with --to lora"),
        (["--to", "lora", "--merged"], "--merged: goes with --to gguf, not with --to lora"),
        (["--to", "lora", "--no-verify", "--base", "x"], "--base x: has no effect with --to lora --no-verify"),
    ],
)
def test_an_option_without_effect_is_refused(base_folder, tmp_path, capsys, options, words):  # noqa: F811
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 2
    import re

    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_a_rank_that_truncates_nothing_is_noted(base_folder, tmp_path):  # noqa: F811
    adapter, said = saved(base_folder, tmp_path / "adapter"), []
    export(adapter, "lora", tmp_path / "out", max_rank=64, verify=False, say=said.append)
    assert "note: --max-rank 64: no rank is larger, so nothing was truncated" in said
    said.clear()
    merge([adapter, adapter], None, tmp_path / "sum", max_rank=64, say=said.append)
    assert "note: --max-rank 64: no rank is larger, so nothing was truncated" in said


@pytest.mark.parametrize("method", ["lsr", "lora"])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_bare_adapter_of_a_classifier_is_verified_on_its_logits(tmp_path, method, architecture, monkeypatch):
    folder = save_classifier(tmp_path / "base", architecture)
    base = load_base(str(folder), task="seq_cls", num_labels=3, quantization="none", dtype="float32")
    config = peft_config(method, {"target_modules": ["query", "value"], "rank": 4}, "SEQ_CLS")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    from tests.adapters.test_save_and_load import StandInTrainer

    save_adapter(StandInTrainer(model), tmp_path / "adapter")
    result = export(tmp_path / "adapter", "lora", tmp_path / "lora", say=silent)
    assert result["agreement"]["positions"] == 4  # one a prompt
    assert result["agreement"]["relative_error"] < 1e-4
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    small = export(tmp_path / "adapter", "adapter", tmp_path / "small", say=silent)
    assert small["agreement"]["relative_error"] < 1e-2
    monkeypatch.setattr("lsr_scale.exporting.pairs.AdapterSource.scaling", lambda *_: 1.7)
    with pytest.raises(UserError, match="is not the trained one"):
        export(tmp_path / "adapter", "lora", tmp_path / "wrong", say=silent)


class _Tokenizer:
    chat_template, eos_token_id, pad_token_id = None, None, 0

    def __call__(self, text):
        return {"input_ids": [5, 6, 7]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_generation_says_that_logits_are_not_finite(value):
    model = tiny_llama().eval()
    assert complete(model, _Tokenizer(), "x", Sampling(3)).tokens == 3
    model.lm_head.weight.data[3] = value
    with pytest.raises(UserError, match="logits are not finite after 3 tokens: the adapter diverged, or the base"):
        complete(model, _Tokenizer(), "x", Sampling(3))
