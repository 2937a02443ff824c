"""Subclasses that replace a module's class in place: parameters, names, hooks and `isinstance` stay as they are.

An instance's `forward` is never set: transformers' checkpointing would silently be lost.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY


class Fused:
    """Marks a class made by `fuse`; `mixin` and `original` are what it was made from."""

    original: type
    mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and pickles find the class by what it was made from: no module has it under its name."""
        _, _, state, *rest = cast(Any, super().__reduce_ex__(protocol))
        # it refers to classes like this one, which pickle does not find
        state = {name: value for name, value in state.items() if name != "fallback_check"}
        return (_new, (self.mixin, self.original), state, *rest)


def original_class(module: nn.Module) -> type:
    """Return a module's class, fused or not, as it is without `fuse`."""
    return module.original if isinstance(module, Fused) else type(module)


@contextmanager
def original_classes(model: nn.Module) -> Iterator[None]:
    """Give every module its class without `fuse` for a while: one operation a layer, with hooks.

    A `forward` that a library has set on a fused module itself is set aside meanwhile: TRL's calls the one that it
    found there, which is the fused class's.
    """
    fused = [
        (module, type(module), vars(module).pop("forward", None))
        for module in model.modules()
        if isinstance(module, Fused)
    ]
    try:
        for module, _, _ in fused:
            module.__class__ = original_class(module)
        yield
    finally:
        for module, kind, forward in fused:
            module.__class__ = kind
            if forward is not None:
                module.forward = forward


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _new(mixin: type, original: type) -> Any:
    """Return an empty instance of the subclass of both, for pickle, in whatever process."""
    fused = subclass(mixin, original)
    return fused.__new__(fused)  # pyright: ignore[reportCallIssue]


def subclass(mixin: type, original: type) -> type:
    """Return the subclass of both, always the same one."""
    key = mixin, original
    if key not in _SUBCLASSES:
        name = "Fused" + original.__name__

        # generation and the Trainer read the signature to know what a model takes
        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)

        members = {"original": original, "mixin": mixin, "forward": forward, "__module__": __name__}
        _SUBCLASSES[key] = type(name, (mixin, original), members)
        if hasattr(original, "_can_record_outputs"):
            # by the class's name transformers looks up which modules return hidden states and attentions
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(_SUBCLASSES[key]), original._can_record_outputs)
    return _SUBCLASSES[key]
