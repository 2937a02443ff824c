"""RMSNorm with a frozen weight, forward and backward, with the residual sum before it and a down-projection behind it.

    s = x + residual                                  (rounded to the dtype; s = x without a residual)
    rstd = 1 / sqrt(mean(s^2) + eps)
    out = s * rstd * weight
    d s = residual_grad + rstd * (w g - s * rstd^2 * mean(w g s))         for g the gradient of out

Float32 arithmetic and one rounding of each result. Bytes per element of a 16-bit dtype: forward 4, with a residual 8;
backward 6, with a residual's gradient 8. Every element is read and written once for rows of at most 8192 elements;
longer rows are read twice.

Tensors are `[T, K]` or `[T, H, K]` (one norm per head) views with unit stride in the last dimension and any others.
An output may be the same memory as an input of the same shape and strides: a program reads an element before it writes
it, and no other program touches it. Two outputs must not overlap.

`rms_norm_project` also multiplies what it normalized by adapters' stacked down-projections,

    xa = out[:, :K] @ down^T                                            [T, R]

on tensor cores, so that a thin GEMM need not read it again, and writes the product behind the normalized columns, where
a K-extended GEMM wants it. It costs no more bytes of memory; a second read of s and `T / ROWS` reads of `down` come
from the L2 cache. The product is of the rounded values, as a GEMM's would be.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import has_triton, is_fake, jit, tl, triton, use_triton


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor:
    """Compute `rms_norm` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        assert residual_out is not None
        x = (x.to(wide) + residual.to(wide)).to(x.dtype)
        residual_out.copy_(x)
    s = x.to(wide)
    rstd = (s.square().mean(-1) + eps).rsqrt()
    out.copy_(s * rstd.unsqueeze(-1) * weight.to(wide))
    return rstd


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor, *, residual_grad: Tensor | None = None
) -> None:
    """Compute `rms_norm_backward` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, weighted, scale = x.to(wide), grad.to(wide) * weight.to(wide), rstd.to(wide).unsqueeze(-1)
    found = scale * (weighted - s * scale.square() * (weighted * s).mean(-1, keepdim=True))
    out.copy_(found if residual_grad is None else found + residual_grad.to(wide))


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


# tl.sum itself is no builtin but compiled code: the interpreter runs it only if told to before Triton is imported
_sum = tl.standard._sum_combine if has_triton else None


@jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    residual_out,
    rstd,
    num_rows,
    eps,
    x_pitch,
    x_head,
    residual_pitch,
    residual_head,
    out_pitch,
    out_head,
    residual_out_pitch,
    residual_out_head,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_rows)[:, None]
    # 64 bits: tokens times pitch exceeds 2^31 for long batches
    tokens = (rows // HEADS).to(tl.int64)[:, None]
    heads = (rows % HEADS).to(tl.int64)[:, None]
    x += tokens * x_pitch + heads * x_head
    out += tokens * out_pitch + heads * out_head
    if HAS_RESIDUAL:
        residual += tokens * residual_pitch + heads * residual_head
        residual_out += tokens * residual_out_pitch + heads * residual_out_head
    columns = tl.arange(0, BLOCK)[None, :]
    if SINGLE:
        mask = valid & (columns < WIDTH)
        # asked for before the sum over the row is waited for
        w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        s = tl.load(x + columns, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            added = tl.load(residual + columns, mask=mask, other=0.0)
            s = (s.to(tl.float32) + added.to(tl.float32)).to(s.dtype)
            tl.store(residual_out + columns, s, mask=mask)
        s = s.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.reduce(s * s, 1, _sum) / WIDTH + eps)
        tl.store(out + columns, (s * scale[:, None] * w).to(out.dtype.element_ty), mask=mask)
    else:
        squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            s = tl.load(x + start + columns, mask=mask, other=0.0)
            if HAS_RESIDUAL:
                added = tl.load(residual + start + columns, mask=mask, other=0.0)
                s = (s.to(tl.float32) + added.to(tl.float32)).to(s.dtype)
                tl.store(residual_out + start + columns, s, mask=mask)
            squares += s.to(tl.float32) * s.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.reduce(squares, 1, _sum) / WIDTH + eps)
        if HAS_RESIDUAL:
            # the sum is read back: by another thread, perhaps, than the one that wrote it
            tl.debug_barrier()
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                s = tl.load(residual_out + start + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                s = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + start + columns, (s * scale[:, None] * w).to(out.dtype.element_ty), mask=mask)
    tl.store(rstd + rows, scale, mask=rows < num_rows)


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
    x_pitch,
    residual_pitch,
    out_pitch,
    residual_out_pitch,
    down_pitch,
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
    # scalars in 64 bits, as tokens times pitch exceeds 2^31 for long batches; offsets inside a tile in 32
    first = tl.program_id(0).to(tl.int64) * ROWS
    x += first * x_pitch + rows * x_pitch
    if HAS_RESIDUAL:
        residual += first * residual_pitch + rows * residual_pitch
        residual_out += first * residual_out_pitch + rows * residual_out_pitch
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
    scale = (1.0 / tl.sqrt(tl.reduce(squares, 1, _sum) / WIDTH + eps))[:, None]
    tl.store(rstd + first + rows, scale, mask=valid)
    # The sum is read back: by another thread, perhaps, than the one that wrote it. So is the scale: kept in registers,
    # it would bring the layout of the first loop into the second, which would then compute its tile in both.
    tl.debug_barrier()
    scale = tl.load(rstd + first + rows, mask=valid, other=0.0)
    if HAS_RESIDUAL:
        x = residual_out
    out += first * out_pitch + rows * out_pitch
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    down += r[:, None] * down_pitch
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


@jit
def _rms_norm_backward_kernel(
    grad,
    x,
    weight,
    rstd,
    residual_grad,
    out,
    num_rows,
    grad_pitch,
    grad_head,
    x_pitch,
    x_head,
    residual_pitch,
    residual_head,
    out_pitch,
    out_head,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_rows)[:, None]
    # 64 bits: tokens times pitch exceeds 2^31 for long batches
    tokens = (rows // HEADS).to(tl.int64)[:, None]
    heads = (rows % HEADS).to(tl.int64)[:, None]
    grad += tokens * grad_pitch + heads * grad_head
    x += tokens * x_pitch + heads * x_head
    out += tokens * out_pitch + heads * out_head
    if HAS_RESIDUAL:
        residual_grad += tokens * residual_pitch + heads * residual_head
    scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if SINGLE:
        mask = valid & (columns < WIDTH)
        w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        g = tl.load(grad + columns, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            added = tl.load(residual_grad + columns, mask=mask, other=0.0)
        g *= w
        projection = tl.reduce(g * s, 1, _sum)[:, None] / WIDTH
        found = scale * (g - s * (scale * scale * projection))
        if HAS_RESIDUAL:
            found += added.to(tl.float32)  # pyright: ignore[reportPossiblyUnboundVariable]
        tl.store(out + columns, found.to(out.dtype.element_ty), mask=mask)
    else:
        products = tl.full([ROWS, BLOCK], 0.0, tl.float32)
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            g = tl.load(grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            products += g * w * tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
        projection = tl.reduce(products, 1, _sum)[:, None] / WIDTH
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            g = tl.load(grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
            found = scale * (g * w - s * (scale * scale * projection))
            if HAS_RESIDUAL:
                found += tl.load(residual_grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + start + columns, found.to(out.dtype.element_ty), mask=mask)


def _launch_shape(
    x: Tensor, block: int | None, rows: int | None, num_warps: int | None
) -> tuple[int, int, int, int, int]:
    """Return `(rows, heads, columns per block, rows per program, warps)`."""
    heads = 1 if x.dim() == 2 else x.shape[1]
    block = block or int(min(triton.next_power_of_2(x.shape[-1]), 8192))
    # short rows (one head) share a program, so that each thread still has 16 elements
    rows = rows or max(1, 2048 // block)
    num_warps = num_warps or (4 if block * rows <= 2048 else 8)
    return x.shape[0] * heads, heads, block, rows, num_warps


def _pitches(x: Tensor, like: Tensor) -> tuple[int, int]:
    """Return the strides between tokens and between heads, having checked what kernels take for granted."""
    assert x.shape == like.shape, (x.shape, like.shape)
    assert x.stride(-1) == 1, f"strides {x.stride()}: the last must be 1"
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    block: int | None = None,
    rows: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """Launch the forward kernel; the arguments are `rms_norm`'s, then a program's columns, rows and warps."""
    num_rows, heads, block, rows, num_warps = _launch_shape(x, block, rows, num_warps)
    assert (residual is None) == (residual_out is None), "residual and residual_out go together"
    assert weight.shape == x.shape[-1:]
    assert weight.is_contiguous()
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if residual_out is None else residual_out,
        rstd,
        num_rows,
        eps,
        *_pitches(x, x),
        *_pitches(x if residual is None else residual, x),
        *_pitches(out, x),
        *_pitches(out if residual_out is None else residual_out, x),
        WIDTH=x.shape[-1],
        HEADS=heads,
        HAS_RESIDUAL=residual is not None,
        SINGLE=block >= x.shape[-1],
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return rstd


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
    _check_projection(x, out, down, xa_out, rank)
    assert (residual is None) == (residual_out is None), "residual and residual_out go together"
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    # a thread's registers hold 32 sums of squares; with what is in flight, two programs share a multiprocessor
    block = block or max(16, 1024 * num_warps // rows)
    if sum_stages is None:
        sum_stages = 4 if residual is None else 3
    # tensor cores want 16 or more, Triton powers of two
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
        _pitches(x, x)[0],
        _pitches(x if residual is None else residual, x)[0],
        out.stride(0),
        _pitches(x if residual_out is None else residual_out, x)[0],
        down.stride(0),
        WIDTH=width,
        R=R,
        RANK=rank,
        HAS_RESIDUAL=residual is not None,
        # two 16-bit elements per register; the interpreter knows no assembly
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


def _check_projection(x: Tensor, out: Tensor, down: Tensor, xa_out: Tensor, rank: int) -> None:
    """Check what the fused kernel takes for granted."""
    (num_rows, width), R = x.shape, down.shape[0]
    assert out.shape == (num_rows, width + R), (out.shape, x.shape, down.shape)
    assert down.shape == (R, width), (down.shape, x.shape)
    assert xa_out.shape == (num_rows, R), (xa_out.shape, x.shape, down.shape)
    assert R % 16 == 0, f"{R} columns: only multiples of 16"
    assert 0 <= rank <= R, f"rank {rank} of {R} columns"
    assert x.stride(1) == out.stride(1) == down.stride(1) == 1, "the last stride must be 1"
    assert xa_out.is_contiguous()
    assert x.dtype == out.dtype == down.dtype == xa_out.dtype, (x.dtype, out.dtype, down.dtype, xa_out.dtype)


def rms_norm_backward_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    out: Tensor,
    *,
    residual_grad: Tensor | None = None,
    block: int | None = None,
    rows: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Launch the backward kernel; the arguments are `rms_norm_backward`'s, then a program's columns, rows and warps."""
    num_rows, heads, block, rows, num_warps = _launch_shape(x, block, rows, num_warps)
    assert weight.shape == x.shape[-1:]
    assert weight.is_contiguous()
    assert rstd.shape == x.shape[:-1]
    assert rstd.is_contiguous()
    _rms_norm_backward_kernel[(triton.cdiv(num_rows, rows),)](
        grad,
        x,
        weight,
        rstd,
        grad if residual_grad is None else residual_grad,
        out,
        num_rows,
        *_pitches(grad, x),
        *_pitches(x, x),
        *_pitches(grad if residual_grad is None else residual_grad, x),
        *_pitches(out, x),
        WIDTH=x.shape[-1],
        HEADS=heads,
        HAS_RESIDUAL=residual_grad is not None,
        SINGLE=block >= x.shape[-1],
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor:
    """Write `s * rstd * weight` to `out`, for `s = x` or `s = x + residual`.

    Args:
        x: `[T, K]` or `[T, H, K]`, unit stride in the last dimension; may be `out` or `residual_out`.
        weight: `[K]`.
        eps: Added to the mean square.
        out: Where the result goes, like `x`.
        residual: What is added to `x` first, like `x`; may be `out` or `residual_out`.
        residual_out: Where the sum goes, like `x`; given exactly if `residual` is.

    Returns:
        rstd, float32 (float64 for float64 inputs) `[T]` or `[T, H]`: what the backward pass needs.
    """
    if is_fake(x):
        return x.new_empty(x.shape[:-1], dtype=torch.float32)
    run = rms_norm_triton if use_triton(x) else rms_norm_reference
    return run(x, weight, eps, out, residual=residual, residual_out=residual_out)


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
        x: `[T, K]`, unit stride in the last dimension and any pitch; may be `residual_out`.
        weight: `[K]`.
        eps: Added to the mean square.
        out: `[T, K + R]` of any pitch, in the dtype of `x`; overlaps no other argument.
        down: `[R, K]` of any pitch, in the dtype of `x`; R is a multiple of 16.
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
        _check_projection(x, out, down, xa_out, 0)
        width = x.shape[1]
        rstd = rms_norm_triton(x, weight, eps, out[:, :width], residual=residual, residual_out=residual_out)
        torch.mm(out[:, :width], down.t(), out=xa_out)
        out[:, width:] = xa_out
        return rstd
    return run(x, weight, eps, out, down, xa_out, rank=rank, residual=residual, residual_out=residual_out)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor, *, residual_grad: Tensor | None = None
) -> None:
    """Write the gradient of the norm's input, plus `residual_grad`, to `out`.

    Args:
        grad: Gradient of the norm's output, `[T, K]` or `[T, H, K]`; may be `out`.
        x: The input that was normalized (with a residual: the sum), like `grad`; may be `out`.
        weight: `[K]`.
        rstd: As `rms_norm` returned it.
        out: Where the gradient goes, like `grad`.
        residual_grad: Gradient of the sum that reaches it past the norm, like `grad`; may be `out`.
    """
    if is_fake(x):
        return
    run = rms_norm_backward_triton if use_triton(x) else rms_norm_backward_reference
    run(grad, x, weight, rstd, out, residual_grad=residual_grad)
