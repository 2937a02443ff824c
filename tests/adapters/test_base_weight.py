"""LoRA-XS, SLoRA, NLoRA and IntTune: their equations, and factors that are made of the base's weights, not saved."""

import json
import math
import os
import time
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, AdapterLinear, peft_config
from lsr_scale.adapters.bank import AdapterBank
from lsr_scale.adapters.hotswap import hotswap_adapter
from lsr_scale.adapters.peft import base_weight
from lsr_scale.adapters.truncated_svd import MAX_EXACT, truncated_svd
from lsr_scale.config import run_from_dict
from lsr_scale.exporting import export
from lsr_scale.layers.frozen_linear import dequantize, dequantize_all, freeze_quantized
from lsr_scale.model.shard import Sharding
from lsr_scale.model.share import share_base
from lsr_scale.planning import plan
from tests.helpers.tiny_models import quantize, randomize, tiny_llama
from tests.helpers.tiny_runs import do, save_llama, tiny_run

NLORA = {"rank": 4, "init": "nystrom", "alpha": 40.0}
INT_TUNE = {**NLORA, "train": "middle"}
WAYS = {"lora_xs": ("lora_xs", {"rank": 4}), "nlora": ("slora", NLORA), "int_tune": ("slora", INT_TUNE)}


def adapted(base: nn.Module, method: str, options: Any) -> Any:
    return get_peft_model(base, peft_config(method, {"target_modules": ["q_proj", "down_proj"], **options}))


def layers_of(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, AdapterLinear)]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "cache"))
    base_weight._IN_MEMORY.clear()


def test_lora_xs_is_its_equation_with_the_singular_values_on_the_inputs_side():
    model = randomize(adapted(tiny_llama(torch.float64), "lora_xs", {"rank": 4, "alpha": 6.0}))
    for layer in layers_of(model):
        left, values, right = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
        factors = layer.factors("default")
        torch.testing.assert_close(factors["up"] @ factors["down"], left[:, :4] * values[:4] @ right[:4])
        torch.testing.assert_close(factors["up"].T @ factors["up"], torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(factors["down"].norm(dim=1), values[:4])
        delta = 1.5 * factors["up"] @ factors["middle"] @ factors["down"]
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.detach())


def test_lora_xs_starts_as_the_base_or_as_in_the_paper(ids):
    base = logits(tiny_llama(torch.float64), ids)
    assert torch.equal(logits(adapted(tiny_llama(torch.float64), "lora_xs", {"rank": 4}), ids), base)
    paper = adapted(tiny_llama(torch.float64), "lora_xs", {"rank": 16, "init": "paper"})
    drawn = torch.cat([layer.factors("default")["middle"].flatten() for layer in layers_of(paper)])
    assert float(drawn.std()) == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(("options", "names"), [(NLORA, ("up", "middle", "down")), (INT_TUNE, ("middle",))])
def test_nystroms_start_is_the_papers_and_is_subtracted(options, names, ids):
    model = adapted(tiny_llama(torch.float64), "slora", options)
    torch.testing.assert_close(logits(model, ids), logits(tiny_llama(torch.float64), ids), rtol=1e-12, atol=1e-12)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(names) * len(layers_of(model))
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in trained)
    starts = []
    for layer in layers_of(model):
        weight, factors = layer.get_base_layer().weight.detach(), layer.factors("default")
        start = {"up": weight[:, :4], "middle": weight[:4, :4], "down": weight[:4]}
        assert all(torch.equal(factors[name], start[name]) for name in names)
        starts.append(start)
    randomize(model)
    for layer, start in zip(layers_of(model), starts, strict=True):
        now = {name: layer.factors("default").get(name, value).detach() for name, value in start.items()}
        delta = now["up"] @ now["middle"] @ now["down"] - start["up"] @ start["middle"] @ start["down"]
        torch.testing.assert_close(layer.get_delta_weight("default"), 10 * delta)
        down, up = layer.materialize("default", torch.float64)
        torch.testing.assert_close(up @ down, 10 * delta)
        assert len(down) == (4 if names == ("middle",) else 8)


def test_training_the_middle_of_what_stays_zero_is_refused():
    with pytest.raises(UserError, match=r"train: middle, .* trains nothing; set init: nystrom"):
        peft_config("slora", {"train": "middle"})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_factors_of_a_quantized_base_are_those_of_its_dequantized_weight(kind, way, ids):
    method, options = way
    base = quantize(tiny_llama(), kind, torch.float32)
    freeze_quantized(base)
    before = logits(base, ids)
    model = adapted(base, method, options)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
    for layer in layers_of(model):
        weight = dequantize(layer.get_base_layer(), torch.float32)
        config = layer.adapter_configs["default"]
        made = METHODS[method].weight_factors(weight, config)
        for name, value in layer.frozen_factors("default").items():
            assert torch.equal(value, made[name].float()), name


def test_a_large_weight_is_decomposed_almost_as_well_as_can_be_the_same_each_time():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(MAX_EXACT + 44, MAX_EXACT + 100, generator=generator) * torch.linspace(2, 0.1, MAX_EXACT + 100)
    exact = torch.linalg.svdvals(weight.double())
    torch.manual_seed(1)
    left, values, right = truncated_svd(weight, 8)
    torch.manual_seed(2)
    again = truncated_svd(weight, 8)
    assert all(torch.equal(one, two) for one, two in zip((left, values, right), again, strict=True))
    error = float((weight.double() - left * values @ right).norm() / exact[8:].norm())
    assert 1 - 1e-12 <= error < 1.001
    torch.testing.assert_close(left.T @ left, torch.eye(8, dtype=torch.float64))
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_file_has_what_trains_and_another_base_is_refused(way, ids, tmp_path):
    method, options = way
    model: Any = randomize(adapted(tiny_llama(), method, options)).eval()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == model.get_nb_trainable_parameters()[0]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval(), ids), logits(model, ids))
    rounded: Any = tiny_llama(torch.bfloat16).float()  # the same base in another dtype is the same base
    PeftModel.from_pretrained(rounded, tmp_path)
    other: Any = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.copy_(torch.randn(48, 80) * 0.02)
    with pytest.raises(UserError, match=r"sketches differ by .* %, .*; load it on the base that it was trained on"):
        PeftModel.from_pretrained(other, tmp_path)


HELD = {"none": "unquantized", "int8": "in int8", "nf4": "in nf4", "fp4": "in fp4"}


def held(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    base = tiny_llama(torch.bfloat16).to(dtype)  # values that either dtype holds
    return base if kind == "none" else quantize(base, kind, dtype)


@pytest.mark.parametrize("kind", HELD)
def test_a_base_that_is_held_otherwise_is_refused_however_little_that_rounds(kind, way, tmp_path, monkeypatch):
    adapted(held(kind), *way).save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(base_weight, "TOLERANCE", math.inf)
        for other in HELD.keys() - {kind}:
            said = f"base's weights, which were held {HELD[kind]}, and this base's are {HELD[other]}; load it on"
            with pytest.raises(UserError, match=said):
                PeftModel.from_pretrained(held(other), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        PeftModel.from_pretrained(held(kind, dtype), tmp_path)
    plain = held(kind)
    dequantize_all(plain)  # the same weights, however they are kept
    PeftModel.from_pretrained(plain, tmp_path)


def test_layers_that_are_not_held_alike_are_counted(tmp_path):
    mixed: Any = held("nf4")
    mixed.model.layers[0].self_attn.q_proj = held("none").model.layers[0].self_attn.q_proj
    adapted(mixed, "lora_xs", {"rank": 4}).save_pretrained(tmp_path)
    said = r"held in nf4 \(3 layers\) and unquantized \(1 layer\), and this base's are in nf4; "
    with pytest.raises(UserError, match=said):
        PeftModel.from_pretrained(held("nf4"), tmp_path)


def test_an_adapter_that_was_saved_before_this_was_noted_is_known_by_its_sketch(tmp_path):
    adapted(held("none"), "lora_xs", {"rank": 4}).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("base_quantization") == {"none": 4}
    file.write_text(json.dumps(config))
    PeftModel.from_pretrained(held("none"), tmp_path)
    with pytest.raises(UserError, match="sketches differ by"):
        PeftModel.from_pretrained(held("nf4"), tmp_path)


class CollectedOnceSeen(weakref.WeakValueDictionary):
    """What is in memory is garbage, which Python collects right after it was seen."""

    def __contains__(self, key: Any) -> bool:
        found = super().__contains__(key)
        self.pop(key, None)
        return found


def test_factors_in_memory_may_be_collected_meanwhile(monkeypatch):
    monkeypatch.setattr(base_weight, "_IN_MEMORY", CollectedOnceSeen())
    base = tiny_llama()
    one, two = (adapted(share_base(base), "lora_xs", {"rank": 4}) for _ in range(2))
    for first, second in zip(layers_of(one), layers_of(two), strict=True):
        for name, value in first.frozen_factors("default").items():
            assert torch.equal(second.frozen_factors("default")[name], value)


def test_the_decomposition_is_made_once_kept_in_the_cache_and_shared_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(base_weight, "MIN_CACHED", 0)
    method, calls = METHODS["lora_xs"], []
    original = method.weight_factors
    counted = classmethod(lambda cls, weight, config: (calls.append(1), original(weight, config))[1])
    monkeypatch.setattr(method, "weight_factors", counted)
    base = quantize(tiny_llama(), "nf4")
    one, two = (adapted(share_base(base), "lora_xs", {"rank": 4}) for _ in range(2))
    assert len(calls) == len(layers_of(one)) == 4
    pairs = list(zip(layers_of(one), layers_of(two), strict=True))
    assert all(a.frozen_factors("default")["up"] is b.frozen_factors("default")["up"] for a, b in pairs)
    kept = [layer.factors("default")["up"].clone() for layer in layers_of(one)]
    base_weight._IN_MEMORY.clear()
    again = adapted(quantize(tiny_llama(), "nf4"), "lora_xs", {"rank": 4})
    assert len(calls) == 4
    assert all(torch.equal(a.factors("default")["up"], b) for a, b in zip(layers_of(again), kept, strict=True))
    adapted(quantize(tiny_llama(), "nf4"), "lora_xs", {"rank": 5})
    assert len(calls) == 8
    files = sorted((tmp_path / "cache" / "factors").iterdir())
    assert len(files) == 8
    for file in files:
        file.write_bytes(b"damaged")
    base_weight._IN_MEMORY.clear()
    adapted(quantize(tiny_llama(), "nf4"), "lora_xs", {"rank": 4})
    assert len(calls) == 12


def test_a_process_looks_once_for_factors_that_have_not_been_used_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(base_weight, "MIN_CACHED", 0)
    folder = tmp_path / "cache" / "factors"
    folder.mkdir(parents=True)
    long_ago = time.time() - (base_weight.DAYS_UNUSED + 1) * 86_400

    def old(name):
        (folder / name).touch()
        os.utime(folder / name, (long_ago, long_ago))

    old("one")
    (folder / "new").touch()
    adapted(tiny_llama(), "lora_xs", {"rank": 4})
    assert not (folder / "one").exists()
    old("two")  # a look for each weight would take longer than the factors, where there are thousands
    adapted(tiny_llama(), "lora_xs", {"rank": 5})
    assert {"two", "new"} < {file.name for file in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_a_sharded_base_gives_the_same_factors_and_stays_sharded(kind, way):
    def base():
        return tiny_llama() if kind == "none" else quantize(tiny_llama(), kind)

    expected = adapted(base(), *way)
    base_weight._IN_MEMORY.clear()
    sharded = base()
    with Sharding(offload=True).loading() as shard_rest:
        shard_rest(sharded)
    found = adapted(sharded, *way)
    for one, two in zip(layers_of(found), layers_of(expected), strict=True):
        assert one.get_base_layer().weight.numel() == 0
        for name, value in two.frozen_factors("default").items():
            assert torch.equal(one.frozen_factors("default")[name], value)


def test_adapters_of_one_bank_and_a_swapped_one_have_the_same_frozen_factors(ids, tmp_path):
    bank_folder = tmp_path / "adapters"
    for seed, (name, options) in enumerate((("anna", NLORA), ("ben", NLORA), ("carl", {"rank": 4}))):
        made: Any = randomize(adapted(tiny_llama(), "slora", options), seed)
        made.save_pretrained(bank_folder / name)
    expected = {
        name: logits(PeftModel.from_pretrained(tiny_llama(), bank_folder / name).eval(), ids)
        for name in ("anna", "ben")
    }
    model = adapted(tiny_llama(), "slora", NLORA).eval()
    bank = AdapterBank(model, bank_folder, memory_gib=0.01)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["ben", "anna"]).logits
    torch.testing.assert_close(found[0], expected["ben"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected["anna"][1], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="of two adapters one is made of the base's weights"):
        bank.load("carl")
    bank.close()
    hotswap_adapter(model, bank_folder / "anna")
    torch.testing.assert_close(logits(model, ids), expected["anna"])
    with pytest.raises(UserError, match="of two adapters one is made of the base's weights"):
        hotswap_adapter(model, bank_folder / "carl")


def test_plan_counts_what_trains_and_the_memory_of_what_does_not():
    def planned(**adapter):
        targets = ["q_proj", "v_proj"]
        return plan(
            run_from_dict(
                {
                    "model": {"name": "mistralai/Mistral-7B-v0.1"},
                    "adapter": {"target_modules": targets, **adapter},
                    "data": {"train": ["arc_easy"]},
                }
            ),
            trace=False,
        )

    xs = planned(method="lora_xs", rank=32)
    assert xs.trainable_parameters == 64 * 32 * 32
    frozen = 4 * 32 * 32 * (4096 + 4096 + 4096 + 1024)
    assert f"lora_xs holds {frozen / 2**20:.1f} MiB of frozen factors beside its base" in xs.warnings
    assert planned(method="slora", rank=32, init="nystrom", train="middle").trainable_parameters == 64 * 32 * 32


def test_a_run_is_resumed_bit_for_bit_and_leaves_as_lora_and_merged(tmp_path):
    save_llama(tmp_path / "model", num_hidden_layers=2)
    adapter = {"method": "lora_xs", "rank": 4, "alpha": 80.0}
    steps = {"max_steps": 4, "save_as_lora": True}
    whole = do(tiny_run(tmp_path, adapter=adapter, training={**steps, "output_dir": str(tmp_path / "whole")}))
    kept = load_file(whole.adapter / "adapter_model.safetensors")
    assert all(name.endswith("loraxs_middle") for name in kept)
    assert min(float(value.abs().max()) for value in kept.values()) > 0
    part = whole.path / "checkpoint-2"
    resumed = do(
        tiny_run(tmp_path, adapter=adapter, training={**steps, "output_dir": str(tmp_path / "whole")}), resume=part
    )
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert kept.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in kept.items())
    written = load_file(whole.lora / "adapter_model.safetensors")
    exported = export(whole.path, "lora", tmp_path / "lora", say=lambda text: None)
    assert exported["agreement"]["relative_error"] < 1e-4
    for name, value in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        torch.testing.assert_close(written[name], value)
