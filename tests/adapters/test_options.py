"""The options of a method in code: what is unknown, or of another type, explains itself as it does in a run's YAML."""

import copy
import pickle
import warnings

import pytest
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from lsr_scale import KronLoraConfig, LsrConfig, UserError
from lsr_scale.adapters import METHODS, method_names, options
from lsr_scale.adapters.inject import inject
from lsr_scale.config import run_from_dict
from tests.helpers.tiny_models import tiny_llama


@pytest.mark.parametrize("method", list(METHODS))
def test_what_other_programs_call_the_rank_is_explained_for_every_method(method):
    for error in (UserError, TypeError):  # what a user catches, and what a call with an unknown keyword raises
        with pytest.raises(error, match="unexpected keyword argument 'r'; here it is rank"):
            METHODS[method].config_class(r=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rnk": 8}, r"'rnk'; did you mean 'rank'\?"),
        ({"separation_ranks": 8}, "did you mean 'separation_rank'"),
        ({"lora_alpha": 8}, "here it is alpha"),
        ({"lora_target_linear": True}, "here it is target_modules: all-linear"),
        ({"rank": "8"}, "^rank: expected an integer >= 1, got '8'"),
        ({"rank": 8.0}, "^rank: expected an integer >= 1, got 8.0"),
        ({"separation_rank": True}, "^separation_rank: expected an integer >= 1, got True"),
        ({"dropout": "a"}, "^dropout: expected float, got 'a'"),
        ({"dropout": 1}, "^dropout: expected 0 <= dropout < 1, got 1"),
        ({"left_in": 2.5}, "^left_in: expected int . None, got 2.5"),
        ({"use_rslora": "yes"}, "^use_rslora: expected bool, got 'yes'"),
        ({"layers_to_transform": "all"}, "^layers_to_transform: expected .*, got 'all'"),
        (
            {"modules_to_save": "lm_head"},
            r"^modules_to_save: expected a list of names, got 'lm_head'; write",
        ),
    ],
)
def test_a_mistake_in_an_option_is_named(options, words):
    with pytest.raises(UserError, match=words):
        LsrConfig(**options)


def test_the_same_name_is_explained_in_the_yaml_of_a_run():
    data = {"model": {"name": "x"}, "adapter": {"method": "lsr", "lora_alpha": 8}, "data": {"train": ["piqa"]}}
    with pytest.raises(UserError, match=r"adapter.lora_alpha: unknown key; here it is adapter.alpha"):
        run_from_dict(data)


def test_what_peft_takes_is_taken():
    config = LsrConfig(target_modules=("q_proj",), layers_to_transform=range(2), dropout=0, task_type="CAUSAL_LM")
    assert config.target_modules == {"q_proj"}
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == copy.copy(config) == config


def test_an_option_that_a_later_release_saved_is_left_out_with_a_warning_as_peft_does(tmp_path):
    KronLoraConfig(rank=4, base_model_name_or_path="x").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"of_tomorrow": 1, ', 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert PeftConfig.from_pretrained(str(tmp_path)).rank == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert any("of_tomorrow" in str(warning.message) for warning in caught)


SMALL = {"kadaptation": {"phm_dim": 4}, "krona": {}, "vera": {"rank": 4}, "tinylora": {"rank": 2, "u": 4}}
WITH_LAYERS = [name for name in method_names() if "layers_to_transform" in options(name).__dataclass_fields__]


@pytest.mark.filterwarnings("ignore:.*more than its dense form.*")
@pytest.mark.parametrize("method", WITH_LAYERS)
def test_every_method_takes_all_linears_of_some_layers(method, tmp_path):
    values = {"target_modules": "all-linear", "layers_to_transform": [1], **SMALL.get(method, {"rank": 4})}
    data = {"model": {"name": "a", "quantization": "none"}, "data": {"train": ["arc_easy"]}}
    run = run_from_dict({**data, "adapter": {"method": method, **values}})
    inject(tiny_llama(), method, run.adapter.options, "causal_lm").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    adapted = [name for name, module in loaded.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == 7
    assert all(".layers.1." in name for name in adapted)
    with pytest.raises(UserError, match=r"layers_to_transform: has no effect where target_modules is an expression"):
        run_from_dict({**data, "adapter": {"method": method, **values, "target_modules": ".*q_proj"}})
