"""What trains can be exported and inspected, or is refused before anything is loaded."""

import json
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.adapters.inject import check_linear
from lsr_scale.cli import main
from lsr_scale.exporting import export, merge, open_adapter
from lsr_scale.exporting.inspect import inspect_adapter
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama
from tests.helpers.tiny_runs import do, save_llama, tiny_run

EXPRESSION = r".*layers\.[0-9]+\..*attn.*\.(q|v)_proj"


def silent(text):
    del text


@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_an_expression_of_many_repeats_trains_and_is_exported(tmp_path, method):
    adapter = {"method": method, "target_modules": EXPRESSION, "rank": 4}
    save_llama(tmp_path / "model", num_hidden_layers=2)
    folder = do(tiny_run(tmp_path, adapter=adapter, training={"max_steps": 1}))
    assert set(inspect_adapter(folder.path)["modules"]) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    }
    for number, place in enumerate((folder.path, folder.adapter)):
        result = export(place, "lora", tmp_path / f"out{number}", say=silent)
        assert result["agreement"]["relative_error"] < 1e-4


@pytest.mark.parametrize("method", [*METHODS, "lora", "lokr"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ".*(embed_tokens|q_proj)", ".*"])
def test_embeddings_are_refused_at_config_time_and_the_advice_works(tmp_path, method, targets):
    adapter = {"method": method, "target_modules": targets}
    words = r"model\.embed_tokens is a table of embeddings.*adapter\.modules_to_save: \[embed_tokens\]"
    if targets == ".*":
        words = "lm_head|embed_tokens"
    with pytest.raises(UserError, match=words):
        tiny_run(tmp_path, adapter=adapter)
    if method == "lora" and targets != ".*":
        good = {"method": method, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
        save_llama(tmp_path / "model", num_hidden_layers=2)
        folder = do(tiny_run(tmp_path, adapter=good, training={"max_steps": 1}))
        export(folder.path, "lora", tmp_path / "out", say=silent)


def test_what_is_not_linear_is_refused_once_the_model_tells():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(UserError, match=r"embed_tokens: a layer of type Embedding is not linear; .*\[embed_tokens\]"):
        check_linear(model)


def test_an_expression_that_matches_for_ever_is_refused_by_config(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name: x/y}\nadapter: {method: lora, target_modules: '(.*)*x'}\ndata: {train: [arc_easy]}\n"
    )
    assert main(["config", str(file)]) == 2
    assert "adapter.target_modules: '(.*)*x' is a regular expression that may take for ever" in capsys.readouterr().err


def test_layers_beside_an_expression_are_refused_and_the_advice_works(tmp_path):
    adapter = {"method": "lsr", "target_modules": r".*self_attn\.q_proj", "layers_to_transform": [0]}
    with pytest.raises(
        UserError, match=r"layers_to_transform: has no effect where target_modules is an expression"
    ) as told:
        tiny_run(tmp_path, adapter=adapter)
    expression = str(told.value).partition("such as ")[2].partition(",")[0]
    tiny_run(tmp_path, adapter={"method": "lsr", "target_modules": expression})
    tiny_run(tmp_path, adapter={"method": "lsr", "target_modules": ["q_proj"], "layers_to_transform": [0]})
    # PEFT takes both for our methods: such an adapter is good, and exported as it is
    options = {key: value for key, value in adapter.items() if key != "method"}
    get_peft_model(tiny_llama(), peft_config("lsr", options, "CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", "lora", tmp_path / "out", verify=False, say=silent)
    assert set(inspect_adapter(tmp_path / "out")["modules"]) == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}


LOKR = {
    "as by default": {"rank": 2},
    "rank beyond every side": {"rank": 64, "alpha": 5.0},
    "rank between the sides": {"rank": 7, "decompose_factor": 2},
    "both sides products": {"rank": 1, "decompose_both": True, "decompose_factor": 4},
    "both sides products, some full": {"rank": 3, "decompose_both": True},
    "by module": {
        "rank": 2,
        "alpha": 3.0,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.1.mlp.up_proj": 7.0},
    },
}


@pytest.mark.parametrize("options", LOKR.values(), ids=LOKR)
def test_lokrs_pair_is_pefts_update_of_every_module(tmp_path, options):
    model: Any = get_peft_model(
        tiny_llama(), peft_config("lokr", {"target_modules": SEVEN_LINEARS, **options}, "CAUSAL_LM")
    )
    randomize(model)
    model.save_pretrained(tmp_path)
    source = open_adapter(tmp_path)
    for name in source.modules:
        down, up = source.pair(name)
        layer = model.get_base_model().get_submodule(name)
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        assert down.shape[0] <= min(down.shape[1], up.shape[0])
    report = inspect_adapter(tmp_path)
    assert report["options"]["rank"] == options["rank"]
    assert report["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lokr_trains_and_leaves_in_every_format(tmp_path):
    save_llama(tmp_path / "model", num_hidden_layers=2)
    adapter = {"method": "lokr", "rank": 2, "rank_pattern": {"q_proj": 5}, "decompose_both": True}
    training = {"max_steps": 2, "learning_rate": 0.05}
    folder = do(tiny_run(tmp_path, model={"quantization": "none"}, adapter=adapter, training=training))
    exact: list[tuple[str, dict]] = [("lora", {}), ("merged", {"dtype": "float32"}), ("gguf", {})]
    for number, (kind, options) in enumerate([*exact, ("adapter", {"bits": 16})]):
        result = export(folder.path, kind, tmp_path / f"out{number}", say=silent, **options)
        assert result["agreement"]["share_of_effect"] < (1e-2 if kind == "adapter" else 1e-3)
    assert main(["inspect", str(folder.path)]) == 0
    merge([folder.path, tmp_path / "out0"], [1.0, -1.0], tmp_path / "merged", say=silent)
    added = open_adapter(tmp_path / "merged")
    for name in added.modules:
        down, up = added.pair(name)
        assert (up @ down).abs().max() < 1e-6
    for bits in (8, 4):
        with pytest.raises(UserError, match="PEFT's own lokr loads 16 bits only; --to lora --max-rank"):
            export(folder.path, "adapter", tmp_path / "packed", bits=bits, say=silent)


def test_lokr_that_is_no_linear_layers_is_refused(tmp_path):
    model: Any = get_peft_model(tiny_llama(), LoKrConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("w2_a"))
    save_file(tensors | {name.replace("w2_a", "t2"): torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(UserError, match=r"q_proj: its factors .* a convolution's, and exports hold linear layers only"):
        open_adapter(tmp_path)
    save_file(tensors | {name: torch.ones(5, 2)}, file)
    with pytest.raises(UserError, match=r"q_proj: the configuration asks for .*'w2_a'.*restore"):
        open_adapter(tmp_path)
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"decompose_both": True, "r": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the configuration asks for"):
        open_adapter(tmp_path)
