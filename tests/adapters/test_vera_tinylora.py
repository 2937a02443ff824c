"""VeRA and TinyLoRA, PEFT's own: their equations, counts, bases, runs, and what is refused."""

from typing import Any

import pytest
import torch
from peft import PeftModel, TinyLoraConfig, VeraConfig, get_peft_model

from lsr_scale import UserError
from lsr_scale.adapters import options, peft_config
from lsr_scale.config import run_from_dict
from lsr_scale.exporting import export
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.planning import plan
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama
from tests.helpers.tiny_runs import do, save_llama, tiny_run

CLASSES = {"vera": VeraConfig, "tinylora": TinyLoraConfig}


def base(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_llama() if kind == "none" else quantize(tiny_llama(), kind, dtype)
    freeze_quantized(model)
    return model


@pytest.mark.parametrize(
    ("method", "kind", "values", "count"),
    [
        ("vera", "none", {"rank": 8}, 14 * 8 + 2 * (48 + 2 * 24 + 48 + 2 * 80 + 48)),
        ("vera", "nf4", {"rank": 8}, 14 * 8 + 2 * (48 + 2 * 24 + 48 + 2 * 80 + 48)),
        ("vera", "int8", {"rank": 8}, 14 * 8 + 2 * (48 + 2 * 24 + 48 + 2 * 80 + 48)),
        ("tinylora", "none", {"u": 7}, 14 * 7),
        ("tinylora", "none", {"u": 7, "weight_tying": 1.0}, 7),
    ],
)
def test_it_is_pefts_starts_as_the_base_trains_and_loads(method, kind, values, count, ids, tmp_path):
    config = peft_config(method, {"target_modules": SEVEN_LINEARS, **values}, "CAUSAL_LM")
    assert isinstance(config, CLASSES[method])
    before = base(kind)(input_ids=ids).logits
    model: Any = get_peft_model(base(kind), config)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.get_nb_trainable_parameters()[0] == count
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert sum(float(gradient.abs().max()) > 0 for gradient in gradients) >= len(gradients) / 2
    randomize(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    if method == "vera":
        down = layer.vera_lambda_d["default"][:, None] * layer.vera_A["default"][:, :80]
        update = layer.vera_lambda_b["default"][:, None] * (layer.vera_B["default"][:48] @ down)
    else:
        keys = getattr(layer, "_tinylora_v_key", None)  # PEFT 0.21.0 refers to the vector itself
        v = layer._tinylora_v_ref["default"] if keys is None else layer.tinylora_v["default"][keys["default"]]
        middle = (v[:, None, None] * layer.tinylora_P["default"]).sum(0)
        update = layer.tinylora_B["default"] @ middle @ layer.tinylora_A["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), update)


@pytest.mark.parametrize("method", CLASSES)
def test_a_run_is_trained_planned_and_its_export_refused_in_words(method, tmp_path):
    save_llama(tmp_path / "model", num_hidden_layers=2)
    model = {"quantization": "nf4" if method == "vera" else "none"}
    adapter = {"method": method, "layers_to_transform": [0]}
    folder = do(tiny_run(tmp_path, model=model, adapter=adapter, training={"max_steps": 1}))
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match=f"peft_type '{method.upper()}' cannot be exported; .*merge_and_unload"):
        export(folder.path, "lora", tmp_path / "out", say=lambda text: None)
    assert {"rank", "layers_to_transform"} <= set(options(method).__dataclass_fields__)


def test_plan_counts_them_without_weights():
    section = {
        "model": {"name": "mistralai/Mistral-7B-v0.1", "quantization": "none"},
        "data": {"train": ["arc_easy"]},
    }
    targets = {"target_modules": ["q_proj", "v_proj"]}
    vera = plan(run_from_dict({**section, "adapter": {"method": "vera", "rank": 64, **targets}}), trace=False)
    assert vera.trainable_parameters == 64 * 64 + 32 * (4096 + 1024)
    shared = 4 * 64 * (4096 + 4096)
    assert f"vera holds {shared / 2**20:.1f} MiB of frozen factors beside its base" in vera.warnings
    tiny = plan(run_from_dict({**section, "adapter": {"method": "tinylora", "u": 13, **targets}}), trace=False)
    assert tiny.trainable_parameters == 64 * 13


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "tinylora"}, "TinyLoRA decomposes the weight as it is stored, .* model.quantization: none"),
        ({"method": "tinylora", "u": 0}, "u: expected an integer >= 1, got 0"),
        ({"method": "tinylora", "weight_tying": 2.0}, "weight_tying: expected 0 <= weight_tying <= 1"),
        ({"method": "vera", "dropout": 1.0}, "dropout: expected 0 <= dropout < 1"),
        ({"method": "vera", "rank": 0}, "rank: expected an integer >= 1"),
    ],
)
def test_what_they_cannot_is_refused_before_anything_is_loaded(adapter, message):
    with pytest.raises(UserError, match=message):
        run_from_dict({"model": {"name": "x/y"}, "adapter": adapter, "data": {"train": ["arc_easy"]}})


def test_tinylora_on_a_sharded_base_is_refused():
    sections = {"model": {"name": "x/y", "quantization": "none"}, "data": {"train": ["arc_easy"]}}
    with pytest.raises(UserError, match=r"not a part of it; set method: lora_xs, or deepspeed.config: zero2"):
        run_from_dict({**sections, "adapter": {"method": "tinylora"}, "deepspeed": {"config": "zero3"}})
    run_from_dict({**sections, "adapter": {"method": "lora_xs"}, "deepspeed": {"config": "zero3"}})
