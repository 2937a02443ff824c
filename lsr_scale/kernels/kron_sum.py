"""Sums of Kronecker products of many rows' factors, read where they lie in a stack of adapters.

    out[b, j] = scale[b, j] * sum_s left[slot_b, j, s] (x) right[slot_b, j, s]        [B, J, M*m, N*n]

Seen as matrices, `left` is `[S, M*N]` and `right` `[S, m*n]`: the sum is their product, whose elements only change
places. Bytes: the factors once, and the result once in its own dtype. In plain torch the factors are gathered, the
product is written in float32, its places are changed, it is scaled and cast, each a pass over the result or more.
"""

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, use_triton


def kron_sum_reference(left: Tensor, right: Tensor, slots: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Do what `kron_sum` does in plain torch, in float64 for float64 factors and in float32 for any other dtype."""
    _check(left, right, slots, scale, out)
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    summed = torch.einsum("bjsMN,bjsmn->bjMmNn", left[slots].to(dtype), right[slots].to(dtype))
    if scale is not None:
        summed = summed * scale[..., None, None, None, None]
    return out.copy_(summed.reshape(out.shape))


@jit
def _kron_sum_kernel(
    left,
    right,
    slots,
    scale,
    out,
    num_modules,
    left_blocks,
    LEFT_COLUMNS: tl.constexpr,
    RIGHT_ROWS: tl.constexpr,
    RIGHT_COLUMNS: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
):
    """Multiply a block of one left factor's elements by a block of the right one's, for one row and module."""
    which = tl.program_id(0)
    block = tl.program_id(1)
    row, module = which // num_modules, which % num_modules
    source = tl.load(slots + row) * num_modules + module  # slots are int64
    i = (block % left_blocks) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    j = (block // left_blocks) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    acc = tl.full((BLOCK_LEFT, BLOCK_RIGHT), 0.0, tl.float32)
    for start in range(0, TERMS, BLOCK_TERMS):
        s = start + tl.arange(0, BLOCK_TERMS)
        lefts = left + source * (TERMS * LEFT_SIZE) + s[None, :] * LEFT_SIZE + i[:, None]
        rights = right + source * (TERMS * RIGHT_SIZE) + s[:, None] * RIGHT_SIZE + j[None, :]
        a = tl.load(lefts, mask=(s < TERMS)[None, :] & (i < LEFT_SIZE)[:, None], other=0.0).to(tl.float32)
        b = tl.load(rights, mask=(s < TERMS)[:, None] & (j < RIGHT_SIZE)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if HAS_SCALE:
        acc = acc * tl.load(scale + which)
    columns: tl.constexpr = LEFT_COLUMNS * RIGHT_COLUMNS
    out_rows = (i // LEFT_COLUMNS)[:, None] * RIGHT_ROWS + (j // RIGHT_COLUMNS)[None, :]
    out_columns = (i % LEFT_COLUMNS)[:, None] * RIGHT_COLUMNS + (j % RIGHT_COLUMNS)[None, :]
    target = out + which.to(tl.int64) * (LEFT_SIZE * RIGHT_SIZE) + out_rows * columns + out_columns
    tl.store(target, acc.to(out.dtype.element_ty), mask=(i < LEFT_SIZE)[:, None] & (j < RIGHT_SIZE)[None, :])


def kron_sum_triton(left: Tensor, right: Tensor, slots: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Do what `kron_sum` does, in one launch of the Triton kernel."""
    _check(left, right, slots, scale, out)
    _, modules, terms, left_rows, left_columns = left.shape
    right_rows, right_columns = right.shape[-2:]
    left_size, right_size = left_rows * left_columns, right_rows * right_columns
    block_left = _block(left_size, 64)
    block_right = _block(right_size, 128)
    left_blocks, right_blocks = -(-left_size // block_left), -(-right_size // block_right)
    _kron_sum_kernel[(len(slots) * modules, left_blocks * right_blocks)](
        left,
        right,
        slots,
        scale,
        out,
        modules,
        left_blocks,
        LEFT_COLUMNS=left_columns,
        RIGHT_ROWS=right_rows,
        RIGHT_COLUMNS=right_columns,
        LEFT_SIZE=left_size,
        RIGHT_SIZE=right_size,
        TERMS=terms,
        HAS_SCALE=scale is not None,
        # tensor cores, with an error of float32's size: the result is rounded to less
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32x3",
        BLOCK_LEFT=block_left,
        BLOCK_RIGHT=block_right,
        BLOCK_TERMS=_block(terms, 32),
        num_warps=4,
    )
    return out


def _block(size: int, most: int) -> int:
    """Return a power of two from 16, the least that `tl.dot` takes, to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def kron_sum(left: Tensor, right: Tensor, slots: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Write each row's scaled sum of Kronecker products, computed in float32, into `out`, and return it.

    Args:
        left: `[C, J, S, M, N]`, contiguous: of C adapters and J modules, S terms.
        right: `[C, J, S, m, n]`, contiguous, of the same dtype.
        slots: `[B]`, int64: which of the C adapters each row has.
        scale: `[B, J]`, or None for ones.
        out: `[B, J, M*m, N*n]`, contiguous.

    Raises:
        ValueError: if shapes, dtypes or layouts do not fit.
    """
    fits = use_triton(left, left.dtype) and use_triton(out)
    return (kron_sum_triton if fits else kron_sum_reference)(left, right, slots, scale, out)


def _check(left: Tensor, right: Tensor, slots: Tensor, scale: Tensor | None, out: Tensor) -> None:
    if left.dim() != 5 or right.dim() != 5 or left.shape[:3] != right.shape[:3] or left.dtype != right.dtype:
        raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} have no terms in common")
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots: expected [B] of int64, got {tuple(slots.shape)} of {slots.dtype}")
    sizes = [left.shape[dim] * right.shape[dim] for dim in (-2, -1)]
    if out.shape != (len(slots), left.shape[1], *sizes):
        raise ValueError(f"out is {tuple(out.shape)}, expected {(len(slots), left.shape[1], *sizes)}")
    if scale is not None and (scale.shape != out.shape[:2] or not scale.is_contiguous()):
        raise ValueError(f"scale: expected {tuple(out.shape[:2])}, contiguous, got {tuple(scale.shape)}")
    if not (left.is_contiguous() and right.is_contiguous() and out.is_contiguous()):
        raise ValueError("left, right and out must be contiguous")
