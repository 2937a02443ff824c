"""The block Hadamard rotation before int8: what lets a fixed-point format hold rows with outliers.

    rotated = x_block H / 8                 for every 64 consecutive columns, H [64, 64] of +1 and -1, H H^T = 64
    x W^T   = (rotated x) (rotated W)^T     so a product does not change if both operands are rotated

A channel a hundred times the rest of its row becomes 64 values of a few times the rest: the row is nearly Gaussian
then, and 127 steps to its largest value are a third of the error of e4m3's 4 significant bits. H is Sylvester's,
symmetric: `H[i, j] = (-1)^(number of common one bits of i and j)`.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl

BLOCK = 64
LARGEST_INT8 = 127.0


def hadamard_matrix(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return H `[64, 64]`, +1 and -1, made on its device: nothing waits for a copy."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate_reference(x: Tensor) -> Tensor:
    """Return the last dimension rotated, a multiple of 64 columns, in float32 or, for float64, in float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # autocast would round the products
    with torch.autocast(wide.device.type, enabled=False):
        blocks = wide.unflatten(-1, (-1, BLOCK)) @ hadamard_matrix(wide.device, wide.dtype)
    return (blocks / 8.0).flatten(-2)


@jit
def hadamard_entries(i, j, dtype: tl.constexpr):
    """Return H at rows `i` and columns `j`, which broadcast."""
    common = i & j
    common ^= common >> 3
    # bit n of 0x96: whether n has an odd number of one bits
    return tl.where(((0x96 >> (common & 7)) & 1) != 0, -1.0, 1.0).to(dtype)


@jit
def hadamard_tile(dtype: tl.constexpr):
    """Return H `[64, 64]`."""
    i = tl.arange(0, 64)
    return hadamard_entries(i[:, None], i[None, :], dtype)


@jit
def rotate_tile(tile, hadamard, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tile `[ROWS, COLUMNS]` in bfloat16 rotated, in float32; ROWS COLUMNS >= 16 * 64, COLUMNS % 64 == 0.

    The products are exact and summed in float32 on tensor cores.
    """
    blocks = tl.reshape(tile, (ROWS * COLUMNS // 64, 64))
    return tl.reshape(tl.dot(blocks, hadamard) * 0.125, (ROWS, COLUMNS))


def int8_scale(largest: Tensor) -> Tensor:
    """Return `largest / 127`, float32: 1 where all is zero, NaN for infinity and NaN, never so small that it is 0."""
    largest = largest.float()
    # by a tensor: on a GPU torch multiplies by the reciprocal of a number, which is not the nearest quotient
    scale = (largest / torch.full_like(largest, LARGEST_INT8)).clamp_min(2.0**-120)
    scale = scale.masked_fill(largest == 0, 1.0)
    return scale.masked_fill(~largest.isfinite(), float("nan"))


@jit
def int8_scale_of(largest):
    """Return `int8_scale` of float32 values, bit for bit."""
    scale = tl.maximum(tl.div_rn(largest, 127.0), 7.52316384526264e-37)
    scale = tl.where(largest == 0.0, 1.0, scale)
    return tl.where(largest < float("inf"), scale, float("nan"))


def encode_int8_reference(rotated: Tensor, scales: Tensor) -> Tensor:
    """Return the codes of rotated values, `round(x / s)` to the nearest, ties to even, within -127 .. 127.

    In a kernel: `encode_int8`.

    Args:
        rotated: `[T, K]`.
        scales: Float32 `[T]`, one per row.
    """
    codes = (rotated.float() * (1.0 / scales)[:, None]).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return codes.nan_to_num(0.0).to(torch.int8)


@jit
def encode_int8(scaled):
    """Return the codes of float32 values that are divided by their scale, as `encode_int8_reference` does."""
    return encode_finite_int8(tl.where(scaled == scaled, scaled, 0.0))


@jit
def encode_finite_int8(scaled):
    """Do what `encode_int8` does; the code of NaN is any."""
    # adding 1.5 * 2^23 rounds to an integer, ties to even, whose two's complement is in the low bits of the sum
    rounded = tl.clamp(scaled, -127.0, 127.0) + 12582912.0
    return rounded.to(tl.int32, bitcast=True).to(tl.int8)
