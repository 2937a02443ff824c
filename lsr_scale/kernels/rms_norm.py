"""RMSNorm with a frozen weight, forward and backward, with the residual sum before it.

    s = x + residual                                  (rounded to the dtype; s = x without a residual)
    rstd = 1 / sqrt(mean(s^2) + eps)
    out = s * rstd * weight
    d s = residual_grad + rstd * (w g - s * rstd^2 * mean(w g s))         for g the gradient of out

Float32 arithmetic and one rounding of each result; of `d s`, rounded, also FP8 codes with a scale per row if wanted.
Bytes per element of a 16-bit dtype: forward 4, with a residual 8; backward 6, with a residual's gradient 8, with codes
1 more. Every element is read and written once for rows of at most 8192 elements;
longer rows are read twice.

Tensors are `[T, K]` or `[T, H, K]` (one norm per head) views with unit stride in the last dimension and any others.
An output may be the same memory as an input of the same shape and strides: a program reads an element before it writes
it, and no other program touches it. Two outputs must not overlap. Fused with the down-projections of the adapters
behind it: `rms_norm_project.py`.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, row_max, row_sum, tl, triton, use_triton
from lsr_scale.kernels.fp8 import E4M3, scale_of
from lsr_scale.kernels.quantize_rows import add_counts, quantize_rows, quantize_rows_reference


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
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    out: Tensor,
    *,
    residual_grad: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Compute `rms_norm_backward` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, weighted, scale = x.to(wide), grad.to(wide) * weight.to(wide), rstd.to(wide).unsqueeze(-1)
    d_s = scale * (weighted - s * scale.square() * (weighted * s).mean(-1, keepdim=True))
    out.copy_(d_s if residual_grad is None else d_s + residual_grad.to(wide))
    if codes is not None:
        assert scales is not None
        quantize_rows_reference(out, codes, scales, counts=counts)


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
    x_row_stride,
    x_head_stride,
    residual_row_stride,
    residual_head_stride,
    out_row_stride,
    out_head_stride,
    residual_out_row_stride,
    residual_out_head_stride,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_rows)[:, None]
    # 64 bits: tokens times row stride exceeds 2^31 for long batches
    tokens = (rows // HEADS).to(tl.int64)[:, None]
    heads = (rows % HEADS).to(tl.int64)[:, None]
    x += tokens * x_row_stride + heads * x_head_stride
    out += tokens * out_row_stride + heads * out_head_stride
    if HAS_RESIDUAL:
        residual += tokens * residual_row_stride + heads * residual_head_stride
        residual_out += tokens * residual_out_row_stride + heads * residual_out_head_stride
    columns = tl.arange(0, BLOCK)[None, :]
    if SINGLE:
        mask = valid & (columns < WIDTH)
        # issued before the reduction over the row, so that its latency is hidden behind it
        w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        s = tl.load(x + columns, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            added = tl.load(residual + columns, mask=mask, other=0.0)
            s = (s.to(tl.float32) + added.to(tl.float32)).to(s.dtype)
            tl.store(residual_out + columns, s, mask=mask)
        s = s.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.reduce(s * s, 1, row_sum) / WIDTH + eps)
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
        scale = 1.0 / tl.sqrt(tl.reduce(squares, 1, row_sum) / WIDTH + eps)
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
def _rms_norm_backward_kernel(
    grad,
    x,
    weight,
    rstd,
    residual_grad,
    out,
    codes,
    scales,
    counts,
    num_rows,
    grad_row_stride,
    grad_head_stride,
    x_row_stride,
    x_head_stride,
    residual_row_stride,
    residual_head_stride,
    out_row_stride,
    out_head_stride,
    codes_row_stride,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_rows)[:, None]
    # 64 bits: tokens times row stride exceeds 2^31 for long batches
    tokens = (rows // HEADS).to(tl.int64)[:, None]
    heads = (rows % HEADS).to(tl.int64)[:, None]
    grad += tokens * grad_row_stride + heads * grad_head_stride
    x += tokens * x_row_stride + heads * x_head_stride
    out += tokens * out_row_stride + heads * out_head_stride
    if HAS_RESIDUAL:
        residual_grad += tokens * residual_row_stride + heads * residual_head_stride
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
        projection = tl.reduce(g * s, 1, row_sum)[:, None] / WIDTH
        d_s = scale * (g - s * (scale * scale * projection))
        if HAS_RESIDUAL:
            d_s += added.to(tl.float32)  # pyright: ignore[reportPossiblyUnboundVariable]
        d_s = d_s.to(out.dtype.element_ty)
        tl.store(out + columns, d_s, mask=mask)
        if HAS_CODES:
            # magnitudes are compared as integers, which order them alike, with infinity and NaN above all; masked
            # elements are zero, those of rows beyond the last too
            largest = tl.reduce(d_s.to(tl.int16, bitcast=True) & 0x7FFF, 1, row_max)
            row_scale = scale_of(largest.to(out.dtype.element_ty, bitcast=True).to(tl.float32))
            # exact: `1.0 / row_scale` is an approximation on a GPU
            values = d_s.to(tl.float32) * tl.div_rn(1.0, row_scale)[:, None]
            tl.store(scales + rows, row_scale, mask=rows < num_rows)
            codes += tokens * codes_row_stride
            tl.store(codes + columns, values.to(codes.dtype.element_ty), mask=mask)
            if HAS_COUNTS:
                underflow = (values != 0.0) & (tl.abs(values) < 2**-6)
                add_counts(counts, underflow, tl.program_id(0), WIDTH, num_rows)
    else:
        products = tl.full([ROWS, BLOCK], 0.0, tl.float32)
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            g = tl.load(grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            products += g * w * tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
        projection = tl.reduce(products, 1, row_sum)[:, None] / WIDTH
        for start in range(0, WIDTH, BLOCK):
            mask = valid & (start + columns < WIDTH)
            w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            g = tl.load(grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
            d_s = scale * (g * w - s * (scale * scale * projection))
            if HAS_RESIDUAL:
                d_s += tl.load(residual_grad + start + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + start + columns, d_s.to(out.dtype.element_ty), mask=mask)


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


def row_and_head_strides(x: Tensor, like: Tensor) -> tuple[int, int]:
    """Return the strides between tokens and between heads, having asserted what the kernels assume."""
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
        *row_and_head_strides(x, x),
        *row_and_head_strides(x if residual is None else residual, x),
        *row_and_head_strides(out, x),
        *row_and_head_strides(out if residual_out is None else residual_out, x),
        WIDTH=x.shape[-1],
        HEADS=heads,
        HAS_RESIDUAL=residual is not None,
        SINGLE=block >= x.shape[-1],
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return rstd


def rms_norm_backward_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    out: Tensor,
    *,
    residual_grad: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    counts: Tensor | None = None,
    block: int | None = None,
    rows: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Launch the backward kernel; the arguments are `rms_norm_backward`'s, then a program's columns, rows and warps."""
    num_rows, heads, block, rows, num_warps = _launch_shape(x, block, rows, num_warps)
    single = block >= x.shape[-1]
    if codes is not None:
        assert codes.shape == x.shape, (codes.shape, x.shape)
        assert x.dim() == 2, f"{x.dim()} dimensions: scales are of rows of a matrix"
        assert out.dtype.itemsize == 2, out.dtype
        assert codes.dtype == E4M3, codes.dtype
        assert codes.stride(1) == 1, "the last stride must be 1"
        assert scales is not None, "codes and scales go together"
        assert scales.shape == x.shape[:1], (scales.shape, x.shape)
        assert scales.dtype == torch.float32, scales.dtype
        assert scales.is_contiguous()
        assert counts is None or (counts.shape == (2,) and counts.dtype == torch.int64), counts
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
        out if codes is None else codes,
        rstd if scales is None else scales,
        rstd if counts is None else counts,
        num_rows,
        *row_and_head_strides(grad, x),
        *row_and_head_strides(x, x),
        *row_and_head_strides(grad if residual_grad is None else residual_grad, x),
        *row_and_head_strides(out, x),
        0 if codes is None else codes.stride(0),
        WIDTH=x.shape[-1],
        HEADS=heads,
        HAS_RESIDUAL=residual_grad is not None,
        HAS_CODES=single and codes is not None,
        HAS_COUNTS=single and codes is not None and counts is not None,
        SINGLE=single,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    if codes is not None and scales is not None and not single:
        quantize_rows(out, codes, scales, counts=counts)


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


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    out: Tensor,
    *,
    residual_grad: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Write the gradient of the norm's input, plus `residual_grad`, to `out`, and if wanted in FP8 too.

    Args:
        grad: Gradient of the norm's output, `[T, K]` or `[T, H, K]`; may be `out`.
        x: The input that was normalized (with a residual: the sum), like `grad`; may be `out`.
        weight: `[K]`.
        rstd: As `rms_norm` returned it.
        out: Where the gradient goes, like `grad`.
        residual_grad: Gradient of the sum that reaches it past the norm, like `grad`; may be `out`.
        codes: `[T, K]` of any row stride, `torch.float8_e4m3fn`: where the codes of `out`, as rounded to its dtype, go.
        scales: Float32 `[T]`: where the rows' scales go (`fp8.py`); given exactly if `codes` is.
        counts: Int64 `[2]`: the number of values that underflow, and the number of values, are added to it.
    """
    if is_fake(x):
        return
    run = rms_norm_backward_triton if use_triton(x) else rms_norm_backward_reference
    run(grad, x, weight, rstd, out, residual_grad=residual_grad, codes=codes, scales=scales, counts=counts)
