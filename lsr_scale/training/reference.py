"""The reference policy: the base with the adapter off, or the adapter that a run starts from, frozen.

TRL's trainers, given a model with an adapter, copy the adapter as "ref" and take that for the reference. For an adapter
that begins with an update of zero the copy is the base: it is taken out, and TRL then switches the adapter off. Of one
that `adapter.start_from` names it stays.

A step switches twice. PEFT's `disable_adapter` describes the model's adapters each time (`get_model_status`) and sets
what of them is trained, while the GPU waits; here a flag of each layer is set.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

REFERENCE = "ref"  # TRL's name


def set_reference(model: PeftModel, starts_from_adapter: bool) -> None:
    """Leave TRL's copy of the adapter in a model, frozen, or take it out.

    Args:
        model: Of a trainer that was just made, its factors in float32 again.
        starts_from_adapter: The adapter's update is not zero: its copy is the reference.

    Raises:
        RuntimeError: if TRL made no copy, or another one: a bug.
    """
    if REFERENCE not in model.peft_config:
        raise RuntimeError(f"TRL made no adapter {REFERENCE!r}; its reference is not known")
    if not starts_from_adapter:
        model.delete_adapter(REFERENCE)
        model.__class__ = _switching(type(model))
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if _is_of("default", name)}
    for name, parameter in trained.items():
        copy: Any = model.get_parameter(_renamed(name))
        # TRL looks for names with something behind the adapter's, and casts copies on a quantized base to bfloat16
        copy.data = parameter.detach().clone()
        copy.requires_grad_(False)


class _Switches:
    """Goes before a PeftModel's class; its layers stay the same as long as it lives."""

    _switched: tuple[list[BaseTunerLayer], list[AuxiliaryTrainingWrapper]] | None = None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the adapter off for a while, as PEFT does, but for `requires_grad`, which stays as it is."""
        model: Any = self
        if self._switched is None:
            found = list(model.modules())
            layers = [one for one in found if isinstance(one, BaseTunerLayer)]
            self._switched = layers, [one for one in found if isinstance(one, AuxiliaryTrainingWrapper)]
        layers, copies = self._switched
        on = [layer for layer in layers if not layer._disable_adapters]
        copies_on = [copy for copy in copies if not copy.disable_adapters]
        was_disabled, model._adapters_disabled = model._adapters_disabled, True
        for layer in on:
            layer._disable_adapters = True
        for copy in copies_on:
            copy.enable_adapters(False)
        try:
            yield
        finally:
            model._adapters_disabled = was_disabled
            for layer in on:
                layer._disable_adapters = False
            for copy in copies_on:
                copy.enable_adapters(True)


@functools.cache
def _switching(kind: type) -> type:
    return type(kind.__name__, (_Switches, kind), {"__module__": __name__})


def _is_of(adapter: str, name: str) -> bool:
    return adapter in name.split(".")


def _renamed(name: str) -> str:
    return ".".join(REFERENCE if part == "default" else part for part in name.split("."))
