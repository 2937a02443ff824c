"""The registration of a method with PEFT, in one place, and the table of the registered ones."""

import sys
import types

from peft.utils import PeftType, register_peft_method

from lsr_scale.adapters.peft.method import AdapterMethod
from lsr_scale.adapters.peft.tuner import AdapterModel

METHODS: dict[str, type[AdapterMethod]] = {}


def register(method: type[AdapterMethod]) -> type[AdapterMethod]:
    """Register a method with PEFT and in `METHODS`: a class decorator.

    PEFT keys its tables by an enum of its own, so the enum gets a member in memory; no file is changed. The rest is
    PEFT's `register_peft_method`.

    Raises:
        TypeError: if the class lacks something that a method must define, naming it.
        KeyError: if there is a method of that name or prefix.
    """
    _check(method)
    if method.name in METHODS:
        raise KeyError(f"there is a method {method.name!r} already: {METHODS[method.name].__module__}")
    member = str.__new__(PeftType, method.name.upper())
    member._name_ = member._value_ = method.name.upper()
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(method.name.upper())
    PeftType._member_map_[method.name.upper()] = member
    PeftType._value2member_map_[method.name.upper()] = member
    type.__setattr__(PeftType, method.name.upper(), member)

    method.config_class.method = method
    tuner = types.new_class(f"{method.__name__}Model", (AdapterModel,))
    tuner.prefix, tuner.method, tuner.__module__ = method.prefix, method, method.__module__  # pyright: ignore
    setattr(sys.modules[method.__module__], tuner.__name__, tuner)  # where pickle looks for it
    register_peft_method(name=method.name, config_cls=method.config_class, model_cls=tuner, prefix=method.prefix)
    METHODS[method.name] = method
    return method


def _check(method: type[AdapterMethod]) -> None:
    """Raise TypeError unless a method defines all that it must: the class is never instantiated, so ABC does not."""
    attributes = ("name", "prefix", "config_class", "parameter_names")
    missing = [name for name in attributes if not hasattr(method, name)] + sorted(method.__abstractmethods__)
    if missing:
        raise TypeError(f"{method.__name__}: define {', '.join(missing)}; see AdapterMethod")
    if not method.is_low_rank() and method.delta_forward.__func__ is AdapterMethod.delta_forward.__func__:
        raise TypeError(f"{method.__name__}: define materialize or, for updates of full rank, delta_forward")
    if "lora_" in method.prefix:
        raise TypeError(
            f"{method.__name__}: prefix {method.prefix!r} has lora_ in it, by which other code selects LoRA"
        )
    if "__dataclass_fields__" not in vars(method.config_class):
        raise TypeError(f"{method.config_class.__name__}: decorate it with @dataclasses.dataclass")
