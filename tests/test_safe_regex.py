"""Regular expressions of module names: one rule at `config` time and for whatever is read from disk."""

import dataclasses
import re

import pytest

from lsr_scale.adapters import METHODS, PEFT_METHODS, peft_config
from lsr_scale.adapters import options as options_of
from lsr_scale.errors import UserError
from lsr_scale.safe_regex import check_regex

USUAL = [
    r".*layers\.[0-9]+\..*attn.*\.(q|v)_proj",
    r".*\.(query|value|q_proj|v_proj)",
    r"(?:\w+\.)*q_proj",
    r"(model\.|decoder\.)*layers\.\d+\.self_attn\.(q|k)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|fc1).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|gate_proj)))",
    r"^(?!.*(vision|visual)).*(q|k|v|o)_proj$",
    r".*\.layers\.(?:1[2-9]|2\d|3[01])\..*\.(?:q|k|v|o|gate|up|down)_proj",
    r".*\d.*\d.*proj",
    r"(.+\.)?(.+\.)?(q|v)_proj",
]
ENDLESS = [
    *("(a+)+$", "(.*)*x", "((a+)+)+$", "(.*.*)*proj$", "(a|a)*b", "(a*)*b", r"(\w+\.?)*!", "(?:a|b|ab)*c", "(x+x+)+y"),
    *(r"model\.layers\.(\w+\.?)*!", ".*" * 10 + "x", r".*\w" * 7 + "z", "(?=(a+)+$)b", "(?:(?:ab|a)(?:b?))*c"),
    *("a*b?" * 400, "(a|b)?" * 300, "a?" * 900, r"^(([a-z])+.)+[A-Z]([a-z])+$"),
]


@pytest.mark.parametrize("expression", USUAL)
def test_usual_expressions_are_taken(expression):
    check_regex(expression, "target_modules")


@pytest.mark.parametrize("expression", [*ENDLESS, "(" * 90 + "a" + ")*" * 90, "a" * 2001])
def test_expressions_that_could_match_for_ever_are_refused(expression):
    with pytest.raises(UserError, match=r"target_modules: .*(take for ever to match|characters, more than)") as told:
        check_regex(expression, "target_modules")
    assert len(str(told.value)) < 400


def test_no_expression_at_all_is_refused_with_advice_that_works():
    with pytest.raises(UserError, match=r"is no regular expression .*; write a list of names") as told:
        peft_config("lsr", {"target_modules": "(q_proj"})
    names = re.findall(r"\[(\w+), (\w+)\]", str(told.value))[0]
    assert peft_config("lsr", {"target_modules": list(names)}).target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("method", [*METHODS, *PEFT_METHODS])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "(.*)*x"}, "target_modules: .*for ever"),
        ({"exclude_modules": "(.*)*x"}, "exclude_modules: .*for ever"),
        ({"modules_to_save": ["(.*)*x"]}, "modules_to_save: .*for ever"),
        ({"layers_to_transform": [0], "layers_pattern": ["(.*)*x"]}, "layers_pattern: .*for ever"),
        ({"rank_pattern": {"(.*)*x": 2}}, "rank_pattern: .*for ever"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\]: expected a finite number"),
        ({"rank_pattern": {"q_proj": True}}, r"rank_pattern\['q_proj'\]: expected an integer >= 1"),
        ({"alpha": float("inf")}, "alpha: expected a finite number"),
        ({"alpha": 1e308}, "alpha: expected a finite number"),
        ({"rank": 10**6}, "rank: expected at most 65536"),
        ({"u": 10**6}, "u: expected at most 65536"),
        ({"d_initial": float("nan")}, "d_initial: expected a finite number"),
        ({"projection_prng_key": -1}, "projection_prng_key: expected an integer from 0"),
        ({"projection_seed": 2**63}, "projection_seed: expected an integer from 0"),
    ],
)
def test_every_method_has_one_rule_for_its_options(method, options, message):
    known = {field.name for field in dataclasses.fields(options_of(method))}
    if not options.keys() <= known:
        message = "not an option of"
    with pytest.raises(UserError, match=message):
        peft_config(method, options)
