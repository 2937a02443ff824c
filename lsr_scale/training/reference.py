"""The reference policy: the base with the adapter off, or the adapter that a run starts from, frozen.

TRL's trainers, given a model with an adapter, copy the adapter as "ref" and take that for the reference. For an adapter
that begins with an update of zero the copy is the base: it is taken out, and TRL then switches the adapter off. Of one
that `adapter.start_from` names it stays.
"""

from typing import Any

from peft import PeftModel

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
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if _is_of("default", name)}
    for name, parameter in trained.items():
        copy: Any = model.get_parameter(_renamed(name))
        # TRL looks for names with something behind the adapter's, and casts copies on a quantized base to bfloat16
        copy.data = parameter.detach().clone()
        copy.requires_grad_(False)


def _is_of(adapter: str, name: str) -> bool:
    return adapter in name.split(".")


def _renamed(name: str) -> str:
    return ".".join(REFERENCE if part == "default" else part for part in name.split("."))
