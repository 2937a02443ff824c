"""The one registration of a method with PEFT, and the table of what is registered."""

import sys
import types

from peft.utils import PeftType, register_peft_method

from lsr_scale.adapters.peft.method import AdapterMethod
from lsr_scale.adapters.peft.tuner import AdapterModel

METHODS: dict[str, type[AdapterMethod]] = {}


def register(method: type[AdapterMethod]) -> type[AdapterMethod]:
    """Make a method known to PEFT and to this package: the one registration, a class decorator.

    PEFT keys its tables by an enum of its own, so the enum gets a member in memory; no file is changed. The rest is
    PEFT's `register_peft_method`, with its checks for unique names and prefixes.
    """
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
