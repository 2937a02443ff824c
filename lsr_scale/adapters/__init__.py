"""The adapter methods by name, and their options. Every file in `adapters/methods/` is imported."""

import dataclasses
import importlib
import pkgutil
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from lsr_scale.adapters import methods
from lsr_scale.adapters.methods.lokr import LokrFactors, LokrOptions
from lsr_scale.adapters.methods.lora import LoraOptions
from lsr_scale.adapters.methods.tinylora import TinyloraOptions
from lsr_scale.adapters.methods.vera import VeraOptions
from lsr_scale.adapters.peft import METHODS, AdapterConfig, AdapterLinear, AdapterMethod, LowRankPair
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.option_checks import check_options
from lsr_scale.option_names import name_here

# PEFT's name of each `model.task`
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}
# PEFT's own methods, by the dataclass that maps our option names to theirs
PEFT_METHODS: dict[str, type[LoraOptions | LokrOptions | VeraOptions | TinyloraOptions]] = {
    "lora": LoraOptions,
    "lokr": LokrOptions,
    "vera": VeraOptions,
    "tinylora": TinyloraOptions,
}

# how the factors of a saved adapter make its update, of every method that is exported: ours, and PEFT's LoRA and LoKr
SAVED_METHODS: Mapping[str, type[AdapterMethod]] = ChainMap(METHODS, {"lora": LowRankPair, "lokr": LokrFactors})


def import_methods() -> None:
    """Import every file in `adapters/methods/`, which registers its method."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


import_methods()


def method_names() -> list[str]:
    """Return the names that `adapter.method` takes: ours, and those of PEFT's own."""
    return [*METHODS, *PEFT_METHODS]


def options(method: str) -> type:
    """Return a dataclass whose fields are the options of a method, each with its help in `metadata['help']`.

    PEFT's bookkeeping fields (task type, base model name, version) are not among them.
    """
    source = PEFT_METHODS.get(method) or _registered(method).config_class
    not_options = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = [f for f in dataclasses.fields(source) if f.name not in not_options and not f.metadata.get("internal")]
    copied = [(f.name, f.type, _copy_field(f)) for f in fields]
    return dataclasses.make_dataclass(f"{method.title().replace('_', '')}Options", copied)


def peft_config(method: str, values: Mapping[str, Any], task_type: str | None = None) -> PeftConfig:
    """Return the PEFT config of a method.

    Args:
        method: One of `method_names()`.
        values: Its options; see `options(method)`.
        task_type: PEFT's task type, for instance "CAUSAL_LM" or "SEQ_CLS".

    Raises:
        UserError: for an unknown method or option, or an impossible value.
    """
    known = {field.name for field in dataclasses.fields(options(method))}
    for name in values:
        if name not in known:
            raise UserError(f"adapter.{name}: not an option of {method}; {name_here(name, known)}")
    check_options(values)
    if method in PEFT_METHODS:
        config: PeftConfig = PEFT_METHODS[method](**values).to_peft()
    else:
        config = _registered(method).config_class(**values)
    config.task_type = task_type  # pyright: ignore[reportAttributeAccessIssue]
    return config


def _registered(method: str) -> type[AdapterMethod]:
    if method not in METHODS:
        raise UserError(f"adapter.method: unknown method {method!r}; {did_you_mean(method, method_names())}")
    return METHODS[method]


def _copy_field(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
    return dataclasses.field(default=field.default, metadata=field.metadata)


__all__ = [
    "METHODS",
    "PEFT_METHODS",
    "SAVED_METHODS",
    "TASK_TYPES",
    "AdapterConfig",
    "AdapterLinear",
    "AdapterMethod",
    "method_names",
    "options",
    "peft_config",
]
