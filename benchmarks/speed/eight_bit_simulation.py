"""Products of a frozen base in 8 bits as they are meant, in plain torch: what fused layers are compared with.

    "fp8"     Y = x' W'^T        dX = dY' W'
    "int8"    Y = x* W*^T        dX = dY' W'

x' and dY' are the activations and the output gradients rounded to e4m3, each row (token) by a power-of-two scale of its
own; W' is the weight rounded by one scale for all linears that read the same input, and is the same in both directions.
x* and W* are the activations and the weight in bfloat16, rotated by blocks of 64 columns, then rounded to int8 by a
scale for each row of both. Adapters stay as they are: they take x and dY themselves. bfloat16 has the values of e4m3
exactly, so products of those are PyTorch's own in it; those of int8, times a scale, are multiplied in float32.

The gradients of linears that share an input are rounded one linear at a time here, together in the fused layers. A
power of two moves no digits, so that only matters to values that underflow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lsr_scale.fused.linear_groups import base_layer
from lsr_scale.kernels.fp8 import encode_reference, power_of_two_scale
from lsr_scale.kernels.hadamard import encode_int8_reference, int8_scale, rotate_reference
from lsr_scale.layers.frozen_linear import dequantize

# linears of a module that read the same input: one weight scale
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def rounded_rows(x: Tensor) -> Tensor:
    """Return `x [..., K]` rounded to e4m3 with a scale per row, in its own dtype."""
    rows = x.reshape(-1, x.shape[-1])
    scales = power_of_two_scale(rows.abs().amax(1).float())
    return (encode_reference(rows, scales).float() * scales[:, None]).to(x.dtype).view(x.shape)


def rounded_weights(weights: list[Tensor]) -> list[Tensor]:
    """Return float32 weights `[N_i, K]` rounded to e4m3 with one scale for all of them."""
    largest = torch.stack([weight.abs().max() for weight in weights]).max()
    scale = power_of_two_scale(largest.view(1))
    return [encode_reference(weight, scale).float() * scale for weight in weights]


def rotated_rows(x: Tensor) -> Tensor:
    """Return `x [..., K]` rounded to bfloat16, rotated, and rounded to int8 with a scale per row, in float32."""
    rows = rotate_reference(x.reshape(-1, x.shape[-1]).bfloat16())
    scales = int8_scale(rows.abs().amax(1))
    return (encode_int8_reference(rows, scales).float() * scales[:, None]).view(x.shape)


class _Product(torch.autograd.Function):
    """`x' W'^T` or, where the linear has a rotated weight, `x* W*^T`, whose input gradient is `dY' W'`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        if linear.rotated is None:
            return nn.functional.linear(rounded_rows(x), linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.float()
        return nn.functional.linear(rotated_rows(x), linear.rotated, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return rounded_rows(grads[0]) @ ctx.linear.weight, None


class SimulatedLinear(nn.Linear):
    """A frozen linear whose products are of operands in 8 bits; `rotated` is W* in float32, or None."""

    rotated: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x' W'^T + b`, or `x* W*^T + b`."""
        return _Product.apply(x, self)


@contextmanager
def simulated(model: nn.Module, compute: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Replace the frozen linears under a model's adapters by simulated ones for a while, in place.

    Args:
        model: A PEFT model of decoder layers, unfused.
        compute: "fp8" or "int8".
        dtype: Of activations, and of the values that weights rounded to e4m3 are held in.
    """
    replaced: list[tuple[Any, nn.Linear]] = []
    for parent in list(model.modules()):
        for names in SHARED_INPUTS:
            adapted: list[Any] = [getattr(parent, name, None) for name in names]
            if any(linear is None or base_layer(linear) is linear for linear in adapted):
                continue
            bases = [base_layer(linear) for linear in adapted]
            exact = [dequantize(base, torch.float32) for base in bases]
            weights = rounded_weights(exact)
            replaced += zip(adapted, bases, strict=True)
            for linear, base, weight, wide in zip(adapted, bases, weights, exact, strict=True):
                linear.base_layer = _simulated(base, weight.to(dtype))
                if compute == "int8":
                    linear.base_layer.rotated = rotated_rows(wide)
    try:
        yield
    finally:
        for linear, base in replaced:
            linear.base_layer = base


def _simulated(base: nn.Linear, weight: Tensor) -> SimulatedLinear:
    linear = SimulatedLinear(base.in_features, base.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = base.bias
    return linear
