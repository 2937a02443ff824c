"""`modules_to_save`, which train fully beside an adapter, in float32: bfloat16 would round small updates away."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def cast_modules_to_save(model: PeftModel, saved: Path | None = None) -> None:
    """Cast `modules_to_save` to float32, in place; their outputs are cast back to the base's dtype, logits are not.

    Args:
        model: A model with its adapter.
        saved: The adapter's folder; weights of `modules_to_save` are read from it again, since PEFT rounded them to
            the base's dtype.
    """
    base: Any = model.get_base_model()
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    if not wrappers:
        return
    body = {id(module) for module in base.base_model.modules()} if base.base_model is not base else set()
    for wrapper in wrappers.values():
        for copy in wrapper.modules_to_save.values():
            copy.float()
            vars(copy)["output_dtype"] = base.dtype if id(wrapper) in body else None
            if not isinstance(copy, _Float32):
                copy.__class__ = type(f"Float32{type(copy).__name__}", (_Float32, type(copy)), {})
    if saved is not None:
        prefixes = tuple(f"{name}." for name in wrappers)
        weights = load_peft_weights(str(saved), device="cpu")
        set_peft_model_state_dict(model, {name: value for name, value in weights.items() if name.startswith(prefixes)})


class _Float32(nn.Module):
    """Mixin before a module's class that casts its inputs to float32, and its output back.

    A subclass, not hooks: fused layers and heads with hooks fall back.
    """

    output_dtype: torch.dtype | None  # None leaves the output in float32

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute in float32."""
        inputs, options = _cast((inputs, options), torch.float32)
        output = super().forward(*inputs, **options)
        return output if self.output_dtype is None else _cast(output, self.output_dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return a pytree with its floating-point tensors cast to a dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)
