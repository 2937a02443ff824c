"""What trains can be exported and inspected, or is refused before anything is loaded."""

import pytest
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from tiny_runs import do, save_llama, tiny_run

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.cli import main
from lsr_scale.export import export
from lsr_scale.export.inspect import inspect_adapter
from lsr_scale.model.inject import check_linear

EXPRESSION = r".*layers\.[0-9]+\..*attn.*\.(q|v)_proj"


def silent(text):
    del text


@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_an_expression_of_many_repeats_trains_and_is_exported(tmp_path, method):
    adapter = {"method": method, "target_modules": EXPRESSION, "rank": 4}
    save_llama(tmp_path / "model")
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
        save_llama(tmp_path / "model")
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
