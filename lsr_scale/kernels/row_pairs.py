"""Products of single rows with low-rank pairs of their own: what a decoding step adds to a linear, in two launches.

    xa[b] = down[b] x[b]          [B, R], float32
    y[b] += up[b] xa[b]           [B, N]

Bytes: every row's pair once. A batched GEMM has a program or two a row here, which takes a long row of `down` step by
step; these have one for each row of `down`, and one for each 128 rows of `up`, so that the GPU's memory is busy.
"""

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, use_triton

BLOCK_N = 128


def add_row_pairs_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Do what `add_row_pairs_` does in plain torch, in float64 for float64 and in float32 for any other dtype."""
    _check(y, x, down, up)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    xa = torch.einsum("bk,brk->br", x.to(dtype), down.to(dtype))
    return y.copy_(y.to(dtype) + torch.einsum("br,bnr->bn", xa, up.to(dtype)))


@jit
def _down_kernel(x, x_stride, down, down_stride, xa, R, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Multiply one row of `down` by the row of x that it belongs to."""
    row = tl.program_id(0).to(tl.int64)
    nth = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    acc = tl.full((BLOCK_K,), 0.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        valid = start + k < K
        a = tl.load(x + row * x_stride + start + k, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(down + row * down_stride + nth * K + start + k, mask=valid, other=0.0).to(tl.float32)
        acc += a * b
    tl.store(xa + row * R + nth, tl.sum(acc, 0))


@jit
def _up_kernel(y, y_stride, xa, up, up_stride, N, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the products of BLOCK_N rows of `up`."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    a = tl.load(xa + row * R + r, mask=r < R, other=0.0)
    b = tl.load(up + row * up_stride + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
    target = y + row * y_stride + n
    before = tl.load(target, mask=n < N, other=0.0).to(tl.float32)
    after = before + tl.sum(b.to(tl.float32) * a[None, :], 1)
    tl.store(target, after.to(y.dtype.element_ty), mask=n < N)


def add_row_pairs_triton(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Do what `add_row_pairs_` does, by the Triton kernels."""
    _check(y, x, down, up)
    (rows, rank, inputs), outputs = down.shape, up.shape[1]
    xa = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    block_k = min(4096, max(128, 1 << (inputs - 1).bit_length()))
    _down_kernel[(rows, rank)](x, x.stride(0), down, down.stride(0), xa, rank, K=inputs, BLOCK_K=block_k, num_warps=4)
    block_r = 1 << (rank - 1).bit_length()
    _up_kernel[(rows, -(-outputs // BLOCK_N))](
        *(y, y.stride(0), xa, up, up.stride(0), outputs), R=rank, BLOCK_R=block_r, BLOCK_N=BLOCK_N, num_warps=4
    )
    return y


def add_row_pairs_(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add each row's `up (down x)` to y, in place, summed in float32, and return it.

    Args:
        y: `[B, N]`, contiguous rows.
        x: `[B, K]`, contiguous rows.
        down: `[B, R, K]`, contiguous within a row.
        up: `[B, N, R]`, contiguous within a row.

    Raises:
        ValueError: if shapes or layouts do not fit.
    """
    fits = use_triton(y) and use_triton(down)
    return (add_row_pairs_triton if fits else add_row_pairs_reference)(y, x, down, up)


def _check(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
    (rows, outputs), inputs, rank = y.shape, x.shape[-1], down.shape[1]
    expected = [(rows, outputs), (rows, inputs), (rows, rank, inputs), (rows, outputs, rank)]
    found = [tuple(tensor.shape) for tensor in (y, x, down, up)]
    if found != expected:
        raise ValueError(f"y, x, down, up: expected {expected}, got {found}")
    if any(tensor[:1].stride()[1:] != tensor[:1].contiguous().stride()[1:] for tensor in (y, x, down, up)):
        raise ValueError("y, x, down, up: each row must be contiguous")
