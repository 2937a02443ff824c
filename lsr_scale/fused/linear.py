"""One adapted linear layer as an autograd function: for other architectures, and in decoder layers that run unfused.

    y = [x | x down^T] [W | up]^T,      dX = [dY | dY up] [W; down]

The weight is dequantized in one launch, forward and again backward; the adapter's products read dY once. Saved for the
backward pass: x, which the gradient of `down` needs, and the thin `x down^T`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsr_scale.adapters.pairs import active_adapters, concatenate_pairs, materialize
from lsr_scale.fused.fallback import linear_fallback_reason
from lsr_scale.fused.linear_groups import LinearGroup


class LinearFunction(torch.autograd.Function):
    """`y = x (W + up down)^T + b`; gradients to x, down and up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Module, down: Tensor, up: Tensor) -> Tensor:
        """Run the layer on `x [..., in]`; `linear` is the adapted module, which alone is saved of it."""
        ctx.linear = linear
        group, flat = LinearGroup([linear], [(down, up)]), x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            out, xa = group.project(flat, group.matrix(x.dtype, x.device))
        assert xa is not None
        ctx.save_for_backward(flat, xa, down, up)
        return out.view(*x.shape[:-1], group.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """Return the gradients of x, down and up (these in float32)."""
        (grad,) = grads
        flat, xa, down, up = ctx.saved_tensors
        group = LinearGroup([ctx.linear], [(down, up)])
        with torch.autocast(grad.device.type, enabled=False):
            matrix = group.matrix(grad.dtype, grad.device)
            extended = group.extended(grad.reshape(-1, group.out_features))
            (d_up,) = group.output_products(extended, xa, matrix)
            (d_down,) = group.down_gradients(group.tail(extended), flat)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = group.input_gradient(group.gradient_input(extended, matrix)[0], matrix)
        return None if d_x is None else d_x.view(*grad.shape[:-1], group.in_features), None, d_down, d_up


class LinearMixin:
    """An adapted linear layer that trains by `LinearFunction` where it can; in evaluation it is its own class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `base_layer(x)` plus the active adapters' updates, `[..., out_features]`."""
        module: Any = self
        adapters = active_adapters(module)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if args or kwargs or not adapters or not torch.is_grad_enabled() or linear_fallback_reason(module) is not None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        ((down, up),) = concatenate_pairs(adapters, materialize(adapters)).values()
        return LinearFunction.apply(x.to(dtype), module, down, up)  # pyright: ignore[reportReturnType]
