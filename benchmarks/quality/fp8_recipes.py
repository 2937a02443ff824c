"""How the operands of a frozen linear's products are rounded to FP8: the package's recipe, and others beside it.

    rows      the package's: inputs and output gradients in e4m3 with a power-of-two scale per row, a group's weights
              with one for all
    amax      as rows, but inputs and output gradients are scaled by a row's largest value: it becomes 448 exactly
    amax_all  as amax, and weights too, by the largest value of an output's row
    blocks    DeepSeek-V3's: 1x128 and 128x128 blocks, each scaled by its largest value
    tensor    a power-of-two scale per tensor for everything
    e5m2      as rows, but output gradients in e5m2
    bf16      what training without FP8 does

Rounding is simulated, on any device: what is returned are the rounded values in float32.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsr_scale.kernels.fp8 import E4M3, LARGEST, encode_reference, power_of_two_scale

E5M2_LARGEST = 57344.0
BLOCK = 128

Round = Callable[[Tensor], Tensor]


def rows(x: Tensor) -> Tensor:
    """Round to e4m3 with a power-of-two scale per row."""
    scales = power_of_two_scale(x.abs().amax(1))
    return encode_reference(x, scales).float() * scales[:, None]


def tensor(x: Tensor) -> Tensor:
    """Round to e4m3 with one power-of-two scale."""
    scale = power_of_two_scale(x.abs().amax()[None])
    return encode_reference(x, scale).float() * scale


def rows_e5m2(x: Tensor) -> Tensor:
    """Round to e5m2 with a power-of-two scale per row."""
    scales = power_of_two_scale(x.abs().amax(1, keepdim=True) * (LARGEST / E5M2_LARGEST))
    return (x / scales).to(torch.float8_e5m2).float() * scales


def rows_amax(x: Tensor) -> Tensor:
    """Round to e4m3 with a float32 scale per row, its largest value over 448."""
    scales = _amax_scales(x.abs().amax(1, keepdim=True))
    return (x / scales).clamp(-LARGEST, LARGEST).to(E4M3).float() * scales


def _amax_scales(largest: Tensor) -> Tensor:
    return (largest / LARGEST).masked_fill(largest == 0, 1.0)


def blocks(x: Tensor, height: int) -> Tensor:
    """Round to e4m3 with a float32 scale per block of so many rows and 128 columns."""
    num_rows, num_columns = x.shape
    padded = nn.functional.pad(x, (0, -num_columns % BLOCK, 0, -num_rows % height))
    tiles = padded.view(padded.shape[0] // height, height, -1, BLOCK)
    scales = _amax_scales(tiles.abs().amax((1, 3), keepdim=True))
    rounded = (tiles / scales).clamp(-LARGEST, LARGEST).to(E4M3).float() * scales
    return rounded.view(padded.shape)[:num_rows, :num_columns]


def exactly(x: Tensor) -> Tensor:
    """Round nothing."""
    return x


def in_bf16(x: Tensor) -> Tensor:
    """Round to bfloat16."""
    return x.bfloat16().float()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the operands of a group's products are rounded: its inputs, its weights, its output gradients."""

    inputs: Round
    weights: Round
    gradients: Round


def low_blocks(x: Tensor) -> Tensor:
    """Round with a scale per 1x128 block."""
    return blocks(x, 1)


def square_blocks(x: Tensor) -> Tensor:
    """Round with a scale per 128x128 block."""
    return blocks(x, BLOCK)


RECIPES = {
    "rows": Recipe(rows, tensor, rows),
    "amax": Recipe(rows_amax, tensor, rows_amax),
    "amax_all": Recipe(rows_amax, rows_amax, rows_amax),
    "blocks": Recipe(low_blocks, square_blocks, low_blocks),
    "tensor": Recipe(tensor, tensor, tensor),
    "e5m2": Recipe(rows, tensor, rows_e5m2),
    "bf16": Recipe(exactly, in_bf16, exactly),
}
