"""Modules trained whole beside an adapter (`modules_to_save`), in float32: bfloat16 would round small updates away."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def cast_modules_to_save(model: PeftModel, saved: Path | None = None) -> None:
    """Hold in float32 what trains whole; around it the base computes in its own dtype, but for logits.

    Args:
        model: With the adapter in it.
        saved: Folder that it was loaded from; what trains whole is read again, for loading rounded it.
    """
    base: Any = model.get_base_model()
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    if not wrappers:
        return
    body = {id(module) for module in base.base_model.modules()} if base.base_model is not base else set()
    for wrapper in wrappers.values():
        for copy in wrapper.modules_to_save.values():
            copy.float()
            vars(copy)["dtype_around"] = base.dtype if id(wrapper) in body else None
            if not isinstance(copy, _Float32):
                copy.__class__ = type(f"Float32{type(copy).__name__}", (_Float32, type(copy)), {})
    if saved is not None:
        prefixes = tuple(f"{name}." for name in wrappers)
        weights = load_peft_weights(str(saved), device="cpu")
        set_peft_model_state_dict(model, {name: value for name, value in weights.items() if name.startswith(prefixes)})


class _Float32(nn.Module):
    """Goes before a module's class: it is called with what the base computes, in another dtype than its weights.

    A subclass, not hooks: fused layers and heads that see hooks step aside.
    """

    dtype_around: torch.dtype | None  # of what is returned; None leaves it in float32

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute in float32."""
        given, named = _cast((inputs, options), torch.float32)
        output = super().forward(*given, **named)
        return output if self.dtype_around is None else _cast(output, self.dtype_around)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return values, in whatever they are, with floating-point tensors in a dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)
