"""What is wrong with a run's file, one line a problem: where, what was expected, what was found, what to do."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, PydanticUndefined

from lsr_scale import option_names
from lsr_scale.config.methods import METHODS, method_of
from lsr_scale.config.rewards import Reward
from lsr_scale.config.training import TASK_DEFAULTS, not_to_set
from lsr_scale.config.training.yaml_types import members_of
from lsr_scale.config.yaml_text import KeyPath, Places, dotted, dump, place_of
from lsr_scale.errors import did_you_mean, shortened

# Values of model.quantization and adapter.init as other trainers call them, and what they are here.
_VALUES_ELSEWHERE = {
    **dict.fromkeys(("4", "4bit", "4-bit", "int4", "qlora"), "nf4"),
    **dict.fromkeys(("8", "8bit", "8-bit"), "int8"),
    **dict.fromkeys(("16", "16bit", "bf16", "bfloat16", "fp16", "float16", "None"), "none"),
    **dict.fromkeys(("lora_ga", "loraga"), "gradient"),
}
# Of adapter.init: what PEFT's LoRA and others have and this package has not.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "mica", "loftq")
# Names from axolotl, LLaMA-Factory, PEFT, TRL, bitsandbytes and older transformers, and what they are called here.
_ELSEWHERE: dict[str, str] = {
    **{name: f"adapter.{option}" for name, option in option_names.ELSEWHERE.items()},
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "load_in_4bit": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "quantization_bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization: nf4 or fp4",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "double_quant": "model.double_quantization",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_quant_storage": "nothing: storage is uint8, the one that no DeepSpeed engine casts",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention",
    "flash_attention": "model.attention",
    "dataset": "data.train",
    "datasets": "data.train",
    "test_datasets": "data.validation",
    "eval_dataset": "data.validation",
    "val_set_size": "data.validation_split",
    "val_size": "data.validation_split",
    "cutoff_len": "training.max_length",
    "sequence_len": "training.max_length",
    "max_seq_length": "training.max_length",
    "sample_packing": "training.packing",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "loraplus_lr_ratio": "training.optim_args: lr_ratio=16, of training.optim: lora_plus",
    "warmup_ratio": "training.warmup_steps, where a value below 1 is a share of all steps, such as 0.03",
    "evaluation_strategy": "training.eval_strategy",
    "patience": "training.early_stopping: {patience: 3}",
    "early_stopping_patience": "training.early_stopping: {patience: 3}",
    "rl": "training.method",
    "stage": "training.method",
    "deepspeed.stage": "deepspeed.config, such as zero3",  # not what another trainer's `stage: sft` is
    "rl_beta": "training.beta",
    "pref_beta": "training.beta",
    "pref_loss": "training.loss_type",
    "reward_funcs": "training.reward",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "train_on_inputs": "training.completion_only_loss: false",
}

_EXPECTED: dict[str, str] = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "str",
    "string_too_short": "text that is not empty",
    "list_type": "list",
    "dict_type": "mapping",
    "model_type": "mapping",
    "model_attributes_type": "mapping",
    "none_required": "null",
    "literal_error": "{expected}",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_short": "a list with at least {min_length} entry",
}

SHOWN = 8  # problems; the rest is counted

SectionModels = Callable[..., Mapping[str, type[BaseModel]]]


class Problem(NamedTuple):
    """One thing that is wrong: where, below the value being checked, and what."""

    path: KeyPath
    text: str


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise what a pydantic validator may raise to report several problems, each at its own place; or return."""
    if problems:
        errors = [
            InitErrorDetails(type=PydanticCustomError("problem", "{text}", {"text": text}), loc=path, input=None)
            for path, text in problems
        ]
        raise ValidationError.from_exception_data("run", errors)


def explain(error: ValidationError, data: Mapping[str, Any], where: str, places: Places, models: SectionModels) -> str:
    """Return a message with every problem.

    Args:
        error: What pydantic found.
        data: What was validated.
        where: The file or whatever `data` comes from.
        places: Where each value stands, by path.
        models: The models of the sections, by name, for a task and a training method.
    """
    expected: dict[KeyPath, list[ErrorDetails]] = {}
    problems: list[Problem] = []
    named = models("causal_lm")
    for details in error.errors(include_url=False):
        path, rest = _in_data(details["loc"], data)
        if details["type"] == "missing":
            problems.append(Problem((*path, rest[-1]), "missing; " + _what_it_is((*path, rest[-1]), data, models)))
        elif details["type"].startswith("union_tag"):
            problems.append(_wrong_method(details["input"], models))
        elif details["type"] == "invalid_key":
            problems.append(Problem(path, "expected a name as the key, got a number"))
        elif details["type"] == "extra_forbidden":
            problems.append(Problem(path, _unknown(path, data, models)))
        elif details["type"] in _EXPECTED:
            expected.setdefault(path, []).append(details)
        elif details["type"] == "problem":
            # The adapter method is part of pydantic's path, not of the file's.
            problems.append(Problem((*path, *(key for key in rest if f"adapter.{key}" not in named)), details["msg"]))
        else:
            problems.append(Problem(path, details["msg"].removeprefix("Value error, ")))
    for path, group in expected.items():
        # A list in place of text is not what is wrong where the list was one of the choices and one item of it is bad.
        if not any(other != path and other[: len(path)] == path for other in expected):
            problems.append(Problem(path, _wrong_value(path, group, data, models)))
    problems.sort(key=lambda problem: _order(place_of(problem.path, places, where)))
    if len(problems) == 1:
        return _line(problems[0], where, places)
    length = 158 if len(problems) > 5 else 238  # two or three lines of the screen each
    lines = [shortened(_line(problem, where, places), length) for problem in problems[:SHOWN]]
    rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([f"{where}: {len(problems)} problems", *lines, *rest])


def _line(problem: Problem, where: str, places: Places) -> str:
    path, text = problem
    if not path:
        return f"{where}: {text}"
    place = place_of(path, places, where)
    name = dotted(path)
    if text.startswith("unknown key") and place.startswith((f"--set {name}=", f"overrides[{name!r}]")):
        return f"{place}: {shortened(text, 400)}"
    name = shortened(name, 80)
    return f"{place}: {name}: {shortened(text, 400)}"


def _in_data(loc: Sequence[str | int], data: Any) -> tuple[KeyPath, list[str | int]]:
    """Split a pydantic location, which names types and adapter methods too, into a path of the file and the rest."""
    path: list[str | int] = []
    rest: list[str | int] = []
    for key in loc:
        if (isinstance(data, dict) and key in data) or (isinstance(data, list) and key in range(len(data))):
            data = data[key]  # pyright: ignore
            path.append(key)
            rest.clear()
        else:
            rest.append(key)
    return tuple(path), rest


def _order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (place, 0)


def _section(path: KeyPath, data: Mapping[str, Any], models: SectionModels) -> type[BaseModel] | None:
    """Return the model whose fields are the valid names at `path`."""
    if path and path[0] == "training":
        model = data.get("model")
        task = model.get("task") if isinstance(model, dict) else None
        known = models(task if task in TASK_DEFAULTS else "causal_lm", method_of(data.get("training")))
    else:
        known = models("causal_lm")
    if len(path) == 3 and isinstance(path[2], int):
        return Reward if path[:2] == ("training", "reward") else known["source"]
    if path == ("adapter",):
        return known.get(f"adapter.{data['adapter'].get('method')}")
    return known.get(dotted(path))


def _unknown(path: KeyPath, data: Mapping[str, Any], models: SectionModels) -> str:
    section, name = str(path[0]), str(path[-1])
    if section == "training":
        if remedy := not_to_set(method_of(data.get("training"))).get(name):
            return f"not a field to set here: {remedy}"
        if text := _of_another_method(name, data, models):
            return text
    known = models("causal_lm")
    if section == "data" and len(path) == 2 and name in known["source"].model_fields:
        return f"unknown key; it belongs to a source, such as train: [{{path: ..., {name}: ...}}]"
    adapter = data.get("adapter")
    method = adapter.get("method") if isinstance(adapter, dict) else None
    for home in ("model", f"adapter.{method}", "data", "training", "deepspeed", "eval"):
        if len(path) <= 2 and home in known and name in known[home].model_fields:
            home = home.partition(".")[0]
            if home == section:
                return "unknown key for task seq_cls; it is a field of trl.SFTConfig, which only task causal_lm has"
            return f"unknown key; it belongs to the section {home}: {home}.{name}"
    if here := _ELSEWHERE.get(f"{section}.{name}", _ELSEWHERE.get(name)):
        return f"unknown key; here it is {here}"
    model = _section(path[:-1], data, models)
    names = [*model.model_fields] if model else []
    return f"unknown key; {did_you_mean(name, [*names, 'sweep'] if len(path) == 1 else names)}"


def _of_another_method(name: str, data: Mapping[str, Any], models: SectionModels) -> str | None:
    """Return what is said of a key of the training section that only other methods have, None where none has it."""
    method, model = method_of(data.get("training")), data.get("model")
    if isinstance(model, dict) and model.get("task") == "seq_cls":
        return None
    others = [one for one in METHODS if one != method and name in models("causal_lm", one)["training"].model_fields]
    if not others:
        return None
    return f"unknown key for training.method: {method}; it is one of {', '.join(others)}; remove it, or set method"


def _wrong_method(section: Mapping[str, Any], models: SectionModels) -> Problem:
    methods = [key.partition(".")[2] for key in models("causal_lm") if key.startswith("adapter.")]
    if "method" not in section:
        return Problem(("adapter", "method"), f"missing; it has to be set: one of {', '.join(methods)}")
    nearest = did_you_mean(str(section["method"]), methods)
    return Problem(("adapter", "method"), f"unknown method {section['method']!r}; {nearest}")


def _what_it_is(path: KeyPath, data: Mapping[str, Any], models: SectionModels) -> str:
    section = _section(path[:-1], data, models)
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None:
        return "it has to be set"
    text = field.description or (field.annotation.__doc__ if field.annotation else "") or ""
    return f"it has to be set: {text[:1].lower()}{text[1:].rstrip('.')}"


def _wrong_value(path: KeyPath, group: list[ErrorDetails], data: Mapping[str, Any], models: SectionModels) -> str:
    value = group[0]["input"] if len(group) == 1 else _at(path, data)
    kinds = [_EXPECTED[details["type"]].format(**_plain(details.get("ctx", {}))) for details in group]
    text = " or ".join(dict.fromkeys(kinds))
    remedies = []
    choices = re.findall("'([^']*)'", text)
    if len(choices) > 6:
        text = "one of its names"
    if (here := _VALUES_ELSEWHERE.get(str(value))) in choices:
        remedies.append(f"here it is {here}")
    elif path == ("adapter", "init") and str(value).startswith(_CHANGES_THE_BASE):
        nearest = "gradient, which changes none, is the nearest" if "gradient" in choices else "leave it out"
        remedies.append(f"{value} changes the base's weights, which stay frozen here; {nearest}")
    elif choices and isinstance(value, str):
        remedies.append(did_you_mean(value, choices))
    elif choices and isinstance(value, bool) and "no" in choices:
        remedies.append("did you mean 'no'?")
    elif "str" in kinds and isinstance(value, int | float):
        remedies.append(f"put it in quotes: '{value}'")
    elif isinstance(value, str) and _looks_like_number(value):
        remedies.append(
            f"write {value.replace('_', '')}" if "_" in value else "remove the quotes"
        )  # YAML 1.2 has no 1_000
    elif "list" in kinds and path[:2] == ("sweep", "grid") and not isinstance(value, list | dict):
        example = _list_of(value, str(path[-1]), models)
        remedies.append(f"write a list of values{example}; one for all trials goes into the run itself")
    elif "list" in kinds and path[:2] == ("sweep", "grid") and isinstance(value, dict) and value:
        remedies.append(f"write dotted keys: {path[-1]}.{next(iter(value))}: [...]")
    elif "list" in kinds and isinstance(value, str | dict):
        remedies.append("write a list, one '- item' a line, or [item, item]")
    elif "mapping" in kinds and len(path) == 1:
        first = "method" if path == ("adapter",) else next(iter(models("causal_lm")[str(path[0])].model_fields))
        remedies.append(f"write its keys below it, such as {first}: ...")
    section = _section(path[:-1], data, models) if path else None
    field = section.model_fields.get(str(path[-1])) if section else None
    if field and field.default is not PydanticUndefined and field.default is not None and not remedies:
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        remedies.append(f"the default is {default}")
    return "; ".join([f"expected {text}, got {value!r}", *remedies])


def _list_of(value: Any, key: str, models: SectionModels) -> str:
    """Return ", such as [value, ...]" in YAML; of a key that takes lists the value is one of these. Empty for null."""
    text = dump([value], short=True).rstrip()
    if value is None or "\n" in text:
        return ""
    section, _, name = key.rpartition(".")
    known = [models("causal_lm", method).items() for method in METHODS]
    fields = [model.model_fields for items in known for home, model in items if home.partition(".")[0] == section]
    kinds = next((members_of(found[name].annotation) for found in fields if name in found), [])
    takes = any(kind is type(value) or (get_origin(kind) is Literal and value in get_args(kind)) for kind in kinds)
    nested = not takes and any(get_origin(kind) is list for kind in kinds)
    return f", such as [{text if nested else text[1:-1]}, ...]"


def _plain(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pydantic context whose bounds read 1, not 1.0."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()}


def _at(path: KeyPath, data: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
