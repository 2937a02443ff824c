"""RMSNorm and, from the same read, its product with the stacked down-projections of the adapters behind it.

    out[:, :K] = rms_norm(x + residual)                                 (`rms_norm.py`)
    xa = out[:, :K] @ down^T                                            [T, R]

The product is computed on tensor cores, so that a thin GEMM need not read the normalized values again, and is written
behind their columns, where a K-extended GEMM wants it. It is of the rounded values, as a GEMM's would be. Bytes per
element of a 16-bit dtype: 4, with a residual 8, as without the product; a second read of s and `T / ROWS` reads of
`down` come from the L2 cache.

Tensors are `[T, K]` views with unit stride in the last dimension. `residual_out` may be the same memory as `x` or
`residual`; `out` overlaps no other argument.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, row_sum, tl, triton, use_triton
from lsr_scale.kernels.rms_norm import rms_norm_reference, rms_norm_triton, row_and_head_strides


def rms_norm_project_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    down: Tensor,
    xa_out: Tensor,
    *,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor:
    """Compute `rms_norm_project` in plain torch, in float32 or, for float64 tensors, in float64."""
    width = x.shape[1]
    rstd = rms_norm_reference(x, weight, eps, out[:, :width], residual=residual, residual_out=residual_out)
    wide = torch.promote_types(x.dtype, torch.float32)
    xa_out.copy_(out[:, :width].to(wide) @ down.to(wide).t())
    out[:, width:] = xa_out
    return rstd


@jit
def _rms_norm_project_kernel(
    x,
    residual,
    weight,
    out,
    residual_out,
    down,
    xa_out,
    rstd,
    num_rows,
    eps,
    x_row_stride,
    residual_row_stride,
    out_row_stride,
    residual_out_row_stride,
    down_row_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_STAGES: tl.constexpr,
):
    """Own ROWS rows: sum their squares BLOCK columns at a time, then normalize and multiply BLOCK_K at a time."""
    dtype = out.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None]
    valid = tl.program_id(0) * ROWS + rows < num_rows
    # scalars in 64 bits, as tokens times row stride exceeds 2^31 for long batches; offsets inside a tile in 32
    first = tl.program_id(0).to(tl.int64) * ROWS
    x += first * x_row_stride + rows * x_row_stride
    if HAS_RESIDUAL:
        residual += first * residual_row_stride + rows * residual_row_stride
        residual_out += first * residual_out_row_stride + rows * residual_out_row_stride
    columns = tl.arange(0, BLOCK)[None, :]
    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=SUM_STAGES):
        mask = valid & (start + columns < WIDTH)
        if HAS_RESIDUAL:
            s = tl.load(x + start + columns, mask=mask, other=0.0, eviction_policy="evict_first")
            added = tl.load(residual + start + columns, mask=mask, other=0.0, eviction_policy="evict_first")
            s = (s.to(tl.float32) + added.to(tl.float32)).to(s.dtype)
            tl.store(residual_out + start + columns, s, mask=mask)
        else:
            s = tl.load(x + start + columns, mask=mask, other=0.0)
        squares += s.to(tl.float32) * s.to(tl.float32)
    scale = (1.0 / tl.sqrt(tl.reduce(squares, 1, row_sum) / WIDTH + eps))[:, None]
    tl.store(rstd + first + rows, scale, mask=valid)
    # The sum is read back: by another thread, perhaps, than the one that wrote it. So is the scale: kept in registers,
    # it would bring the layout of the first loop into the second, which would then compute its tile in both.
    tl.debug_barrier()
    scale = tl.load(rstd + first + rows, mask=valid, other=0.0)
    if HAS_RESIDUAL:
        x = residual_out
    out += first * out_row_stride + rows * out_row_stride
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    down += r[:, None] * down_row_stride
    acc = tl.full([ROWS, BLOCK_R], 0.0, tl.float32)
    steps: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    for step in range(steps):
        # backwards: what was read last is still in the cache when all programs' rows together are not
        start = (steps - 1 - step) * BLOCK_K
        inside = (start + k < WIDTH)[None, :]
        # masked elements are zero in both operands
        w = tl.load(weight + start + k, mask=start + k < WIDTH, other=0.0).to(tl.float32)
        s = tl.load(x + start + k[None, :], mask=valid & inside, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        down_tile = tl.load(down + start + k[None, :], mask=(r < RANK)[:, None] & inside, other=0.0)
        normalized = (s * scale * w[None, :]).to(dtype)
        if PIN:
            # An opaque copy: without it the compiler computes the tile, and loads its inputs, once for the store and
            # once more in the layout that the product wants.
            normalized = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [normalized], dtype=dtype, is_pure=False, pack=2
            )
        tl.store(out + start + k[None, :], normalized, mask=valid & inside, eviction_policy="evict_first")
        acc = tl.dot(normalized, tl.trans(down_tile), acc, input_precision="ieee")
    xa = acc.to(dtype)
    xa_out += first * R + rows * R
    tl.store(out + WIDTH + r[None, :], xa, mask=valid & (r < R)[None, :])
    tl.store(xa_out + r[None, :], xa, mask=valid & (r < R)[None, :])
    for start in range(BLOCK_R, R, 16):
        rest = start + tl.arange(0, 16)[None, :]
        zero = tl.full([ROWS, 16], 0.0, dtype)
        tl.store(out + WIDTH + rest, zero, mask=valid)
        tl.store(xa_out + rest, zero, mask=valid)


def rms_norm_project_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    down: Tensor,
    xa_out: Tensor,
    *,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    rows: int = 32,
    block: int | None = None,
    block_k: int | None = None,
    num_warps: int = 8,
    num_stages: int = 3,
    sum_stages: int | None = None,
) -> Tensor:
    """Launch the fused kernel; the arguments are `rms_norm_project`'s, then these.

    `rows` per program, a power of two from 16: more of them read `down` less often, but a cache holds them less well
    until they are read again; `block` columns per step of the sum of squares, `block_k` columns per step of the
    product (by default what shared memory has room for); `sum_stages` (by default 4, with a residual 3) and
    `num_stages` of software pipelining of the two.
    """
    num_rows, width = x.shape
    R = down.shape[0]
    rank = R if rank is None else rank
    _check(x, out, down, xa_out, rank)
    assert (residual is None) == (residual_out is None), "residual and residual_out go together"
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    # a thread's registers hold 32 sums of squares; with what is in flight, two programs share a multiprocessor
    block = block or max(16, 1024 * num_warps // rows)
    if sum_stages is None:
        sum_stages = 4 if residual is None else 3
    # tensor cores want 16 columns or more, Triton powers of two
    block_r = max(16, triton.next_power_of_2(rank))
    # with a tile of `down` of at most 32 KB, a multiprocessor has room for two programs of three stages
    block_k = block_k or max(32, min(256 // x.dtype.itemsize, 32768 // (block_r * x.dtype.itemsize)))
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    _rms_norm_project_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if residual_out is None else residual_out,
        down,
        xa_out,
        rstd,
        num_rows,
        eps,
        row_and_head_strides(x, x)[0],
        row_and_head_strides(x if residual is None else residual, x)[0],
        out.stride(0),
        row_and_head_strides(x if residual_out is None else residual_out, x)[0],
        down.stride(0),
        WIDTH=width,
        R=R,
        RANK=rank,
        HAS_RESIDUAL=residual is not None,
        # two 16-bit elements per register; the interpreter has no inline assembly
        PIN=x.is_cuda and x.dtype.itemsize == 2,
        ROWS=rows,
        BLOCK=block,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        SUM_STAGES=sum_stages,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return rstd


def _check(x: Tensor, out: Tensor, down: Tensor, xa_out: Tensor, rank: int) -> None:
    """Assert what the fused kernel assumes of shapes, strides and dtypes."""
    (num_rows, width), R = x.shape, down.shape[0]
    assert out.shape == (num_rows, width + R), (out.shape, x.shape, down.shape)
    assert down.shape == (R, width), (down.shape, x.shape)
    assert xa_out.shape == (num_rows, R), (xa_out.shape, x.shape, down.shape)
    assert R % 16 == 0, f"{R} columns: only multiples of 16"
    assert 0 <= rank <= R, f"rank {rank} of {R} columns"
    assert x.stride(1) == out.stride(1) == down.stride(1) == 1, "the last stride must be 1"
    assert xa_out.is_contiguous()
    assert x.dtype == out.dtype == down.dtype == xa_out.dtype, (x.dtype, out.dtype, down.dtype, xa_out.dtype)


def rms_norm_project(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    down: Tensor,
    xa_out: Tensor,
    *,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor:
    """Write `rms_norm` to `out[:, :K]`, and its product with `down^T` to `out[:, K:]` and to `xa_out`.

    The product is of the normalized values as rounded to the dtype, summed in float32 and rounded once.

    Args:
        x: `[T, K]`, unit stride in the last dimension, any row stride; may be `residual_out`.
        weight: `[K]`.
        eps: Added to the mean square.
        out: `[T, K + R]` of any row stride, in the dtype of `x`; overlaps no other argument.
        down: `[R, K]` of any row stride, in the dtype of `x`; R is a multiple of 16.
        xa_out: `[T, R]`, contiguous, in the dtype of `x`.
        rank: How many rows of `down` are not zero (only these need be read); all if not given.
        residual: What is added to `x` first, like `x`; may be `residual_out`.
        residual_out: Where the sum goes, like `x`; given exactly if `residual` is.

    Returns:
        rstd, float32 (float64 for float64 inputs) `[T]`.
    """
    if is_fake(x):
        return x.new_empty(len(x), dtype=torch.float32)
    if not use_triton(x):
        run = rms_norm_project_reference
    elif x.dtype.itemsize == 2 and (down.shape[0] if rank is None else rank) <= 128:
        run = rms_norm_project_triton
    else:
        # float32 has no tensor cores here, and beyond 128 columns the product is no longer hidden behind memory
        _check(x, out, down, xa_out, 0)
        width = x.shape[1]
        rstd = rms_norm_triton(x, weight, eps, out[:, :width], residual=residual, residual_out=residual_out)
        torch.mm(out[:, :width], down.t(), out=xa_out)
        out[:, width:] = xa_out
        return rstd
    return run(x, weight, eps, out, down, xa_out, rank=rank, residual=residual, residual_out=residual_out)
