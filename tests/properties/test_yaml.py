"""YAML and back: data, whole runs, and assignments on the command line mean the same wherever they are written."""

import copy
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, method_names
from lsr_scale.config import dump_yaml, run_from_dict, yaml_text
from lsr_scale.config.training import training_model
from tests.helpers.hypothesis_settings import bounded
from tests.helpers.run_text import load

# what YAML 1.1, YAML 1.2 or nobody takes for something else than text
TRAPS = ["", "~", "null", "no", "On", "yes", "1e-3", "0o7", "010", "1:30", "0x1F", ".inf", "-.5", "1_000", "=", "<<"]
TRAPS += [
    "2026-11-28",
    "- a",
    "a: b",
    "#",
    "a #b",
    "'",
    '"',
    "\\",
    "\t",
    " a ",
    "\n",
    "a\nb\n",
    "!x",
    "&x",
    "*x",
    "%x",
    "@",
]
TRAPS += [
    "{",
    "[",
    "? a",
    "| a",
    "> a",
    "--- ",
    "...",
    "true",
    "NaN",
    "\x85",
    "\u2028",
    "\ufeff",
    "\u00e9",
    "\U0001f600",
]
TEXT = st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
NUMBERS = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False)
DATA = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def equal(one, other):
    """Tell whether data is equal and of the same types: 1, 1.0 and true are three things, and 0.0 and -0.0 two."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    signs = math.copysign(1, one) == math.copysign(1, other) if isinstance(one, float) and one == other else True
    return type(one) is type(other) and one == other and signs


@bounded(200)
@given(data=DATA)
@example(data=1e-3)
@example(data=1e300)
@example(data=-0.0)
@example(data={"<<": {"a": 1}})
@example(data=math.inf)
def test_data_comes_back_as_it_was_dumped(data):
    text = yaml_text.dump(data)
    assert equal(yaml_text.parse(text, "dumped")[0], data), text


@bounded(80)
@given(data=st.dictionaries(st.sampled_from("abc"), DATA, min_size=1), value=DATA)
def test_an_assignment_says_what_the_file_would(data, value):
    changed = copy.deepcopy(data)
    text = yaml_text.dump(value).removesuffix("...\n").strip("\n")
    yaml_text.override(changed, {}, [f"b={text}"], shorthand="path")
    assert equal(
        {key: changed[key] for key in sorted(changed)},
        {key: ({**data, "b": value})[key] for key in sorted({**data, "b": 0})},
    )


CHOICES = {
    "model": {
        "quantization": ["nf4", "fp4", "int8", "none"],
        "double_quantization": [True, False],
        "dtype": ["auto", "bfloat16", "float32", "float16"],
        "revision": [None, "main", "1e5", "010"],
        "chat_template": [None, "no", "a: b.jinja"],
        "random_weights": [True, False],
    },
    "training": {
        "learning_rate": [1e-3, 5e-324, 1.0, 1e-05, 2e-4],
        "max_steps": [-1, 1, 10**6],
        "num_train_epochs": [1, 0.5, 3.0],
        "max_length": [None, 1, 512, 10**6],
        "per_device_train_batch_size": [1, 7],
        "optim": ["adamw_torch", "sgd", "adafactor", "paged_adamw_8bit"],
        "lr_scheduler_type": ["linear", "cosine", "constant_with_warmup"],
        "fused": ["on", "off", "auto"],
        "memory": ["auto", "save", "speed"],
        "save_strategy": ["no", "steps", "epoch"],
        "output_dir": ["runs/a b", "1", "~/x", "-", "yes", "r\u00e9sum\u00e9"],
        "gradient_checkpointing": [None, True, False],
        "report_to": ["none", ["tensorboard"]],
        "seed": [0, 2**31],
        "packing": [True, False],
        "weight_decay": [0, 0.1],
    },
    "eval": {"before": [True, False], "limit": [None, 1, 100], "batch_tokens": [1, 8192]},
    "deepspeed": {"config": [None, "zero0", "zero2", "zero3_offload"]},
}
OF_ADAPTERS = {
    "target_modules": ["all-linear", r".*\.q_proj", ["q_proj", "v_proj"], ["no", "1e3"]],
    "exclude_modules": [None, ["lm_head"]],
    "modules_to_save": [None, ["lm_head"]],
    "rank": [1, 4],
    "alpha": [None, 8, 0.5, 1e-7],
    "dropout": [0, 0.1],
    "rank_pattern": [{}, {"q_proj": 2, r".*\.1\..*": 8}],
    "alpha_pattern": [{}, {"1e3": 4.0}],
}
SOURCES = [
    "arc_easy",
    "rows/no.jsonl",
    {"path": "1e3", "limit": 4},
    {"path": "x", "split": "train[:5%]", "name": "010"},
]


@st.composite
def runs(draw):
    """Draw a run as a file has it: of each section some fields, each of its possible values."""
    values = {"data": {"train": draw(st.lists(st.sampled_from(SOURCES), min_size=1, max_size=3))}}
    for section, fields in CHOICES.items():
        chosen = draw(st.sets(st.sampled_from(sorted(fields)), max_size=4))
        values[section] = {name: draw(st.sampled_from(fields[name])) for name in sorted(chosen)}
    values["model"]["name"] = draw(st.sampled_from(["some/model", "builtin:smollm2-135m-instruct", "./no", "1e3"]))
    method = draw(st.sampled_from(method_names()))
    names = (
        set(OF_ADAPTERS)
        - ({"dropout"} if method == "lokr" else set())
        - ({"exclude_modules", "alpha", "rank_pattern", "alpha_pattern"} if method in ("vera", "tinylora") else set())
        - ({"rank", "rank_pattern"} if method == "krona" else set())
    )
    chosen = draw(st.sets(st.sampled_from(sorted(names)), max_size=4))
    values["adapter"] = {name: draw(st.sampled_from(OF_ADAPTERS[name])) for name in sorted(chosen)}
    values["adapter"]["method"] = method
    return values


@bounded(120)
@given(values=runs())
def test_a_resolved_run_is_the_same_run(values):
    try:
        run = run_from_dict(values)
    except UserError:
        return  # some fields do not go together, which says the refusal
    text = dump_yaml(run)
    again = load(text)
    assert again == run
    assert dump_yaml(again) == text
    assert equal(again.model_dump(), run.model_dump())


@bounded(60)
@given(values=runs(), data=st.data())
def test_what_is_set_on_the_command_line_is_what_the_file_says(values, data):
    section = data.draw(st.sampled_from([name for name in CHOICES if values[name]]))
    name = data.draw(st.sampled_from(sorted(values[section])))
    rest = copy.deepcopy(values)
    value = rest[section].pop(name)
    text = yaml_text.dump(value).removesuffix("...\n").strip("\n")
    outcomes = []
    for file, words in ((values, []), (rest, [f"{section}.{name}={text}"])):
        try:
            outcomes.append(load(yaml_text.dump(file), *words).model_dump())
        except UserError as error:
            outcomes.append(len(str(error).splitlines()))
    assert equal(outcomes[0], outcomes[1]) if isinstance(outcomes[0], dict) else outcomes[0] == outcomes[1]


def test_the_fields_drawn_here_are_fields():
    assert set(CHOICES["training"]) <= set(training_model("causal_lm").model_fields)
    assert set(METHODS) < set(method_names())
    with pytest.raises(UserError):
        run_from_dict({"model": {"name": "x"}})
