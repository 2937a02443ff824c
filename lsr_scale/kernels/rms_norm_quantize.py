"""RMSNorm to 8-bit codes and, from the same read, its product with the stacked down-projections of its adapters.

    s = x + residual                                  (rounded to the dtype; s = x without a residual)
    n = s * weight * rstd                             (rounded to the dtype; `rms_norm.py`)
    codes = e4m3(n / scale)                           FP8: one power of two per row (`fp8.py`), or
    codes = round(rotated n / scale)                  int8: largest|rotated n| / 127 of each row (`hadamard.py`)
    xa = n @ down^T                                   [T, R]

The dtype of `codes` says which. The normalized values themselves are not written: the base's product takes the codes,
and the adapters' product, of the values as the dtype rounds them, sees neither codes nor the rotation. Bytes per
element of a 16-bit dtype: 3, with a residual 7; a second read of s and `T / ROWS` reads of `down` come from the L2
cache.

A row's scale is needed before its first code: the loop that sums the squares also takes the row's largest value.

FP8: the largest |s * weight|. Rounding is monotonic, so `round(largest * rstd)` is the largest of the row's rounded
values, bit for bit, if these are computed in the same order: `(s * weight) * rstd`. So they are here, while `rms_norm`
computes `(s * rstd) * weight`: the two differ by a last bit of float32 before they are rounded, seldom by a last bit of
the dtype after it (of 16-bit factors, s * weight is exact in float32: this order rounds less). So no code saturates,
and codes are those of the rounded values with the scale that is written.

int8: the largest of `s * weight` rounded to the dtype and rotated. Times rstd it is the largest of the rotated n, but
for what is rounded before the rotation: there s * weight, in n its product with rstd. So a scale is off by two
roundings, 2^-7 of it, at most and by far less in most rows, and codes are clamped to -127 .. 127. Both loops rotate, on
tensor cores: 128 operations per element and loop.

Tensors are `[T, K]` views with unit stride in the last dimension. `residual_out` may be the same memory as `x` or
`residual`; other outputs overlap no other argument.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, row_max, row_sum, tl, triton, use_triton
from lsr_scale.kernels.fp8 import E4M3, scale_of
from lsr_scale.kernels.hadamard import BLOCK as HADAMARD_BLOCK
from lsr_scale.kernels.hadamard import encode_int8, hadamard_tile, int8_scale_of, rotate_tile
from lsr_scale.kernels.quantize_rows import add_counts, quantize_rows, quantize_rows_reference
from lsr_scale.kernels.rms_norm import rms_norm_triton, row_and_head_strides


def rms_norm_quantize_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    *,
    down: Tensor | None = None,
    xa_out: Tensor | None = None,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Compute `rms_norm_quantize` in plain torch."""
    if residual is not None:
        assert residual_out is not None
        x = (x.float() + residual.float()).to(x.dtype)
        residual_out.copy_(x)
    s = x.float()
    rstd = (s.square().mean(-1) + eps).rsqrt()
    normalized = (s * weight.float() * rstd.unsqueeze(-1)).to(x.dtype)
    quantize_rows_reference(normalized, codes, scales, counts=counts, projection=down, product=xa_out, rank=rank)
    return rstd


@jit
def _opaque(tile, PIN: tl.constexpr):
    """Return a tile that is computed once.

    Without it the compiler computes the tile, and loads its inputs, once for one use and once more in the layout that a
    product wants.
    """
    if PIN:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    return tile


@jit
def _rms_norm_quantize_kernel(
    x,
    residual,
    weight,
    codes,
    scales,
    residual_out,
    down,
    xa_out,
    rstd,
    counts,
    num_rows,
    eps,
    x_row_stride,
    residual_row_stride,
    codes_row_stride,
    residual_out_row_stride,
    down_row_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    PIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_STAGES: tl.constexpr,
):
    """Own ROWS rows: squares and the largest, BLOCK columns at a time, then codes and product, BLOCK_K at a time."""
    dtype = x.dtype.element_ty
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
    if ROTATED:
        hadamard = hadamard_tile(dtype)
        # magnitudes are compared as integers, which order them alike, with infinity and NaN above all
        largest = tl.full([ROWS, BLOCK], 0, tl.int32)
    else:
        largest = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=SUM_STAGES):
        mask = valid & (start + columns < WIDTH)
        w = tl.load(weight + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            s = tl.load(x + start + columns, mask=mask, other=0.0, eviction_policy="evict_first")
            added = tl.load(residual + start + columns, mask=mask, other=0.0, eviction_policy="evict_first")
            s = (s.to(tl.float32) + added.to(tl.float32)).to(dtype)
            tl.store(residual_out + start + columns, s, mask=mask)
        else:
            s = tl.load(x + start + columns, mask=mask, other=0.0)
        s = s.to(tl.float32)
        squares += s * s
        if ROTATED:
            rotated = rotate_tile(_opaque((s * w).to(dtype), PIN), hadamard, ROWS, BLOCK)  # pyright: ignore[reportPossiblyUnboundVariable]
            largest = tl.maximum(largest, rotated.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        else:
            largest = tl.maximum(largest, tl.abs(s * w))
    scale = (1.0 / tl.sqrt(tl.reduce(squares, 1, row_sum) / WIDTH + eps))[:, None]
    if ROTATED:
        largest = tl.reduce(largest, 1, row_max)[:, None].to(tl.float32, bitcast=True) * scale
        tl.store(rstd + first + rows, scale, mask=valid)
        tl.store(scales + first + rows, int8_scale_of(largest), mask=valid)
    else:
        largest = (tl.reduce(largest, 1, row_max)[:, None] * scale).to(dtype)
        tl.store(rstd + first + rows, scale, mask=valid)
        tl.store(scales + first + rows, scale_of(largest.to(tl.float32)), mask=valid)
    # The sum is read back: by another thread, perhaps, than the one that wrote it. So are the scales: kept in
    # registers, they would bring the layout of the first loop into the second, which would then compute its tile in
    # both.
    tl.debug_barrier()
    row = first + tl.arange(0, ROWS)
    scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
    # exact: `1.0 / scale` is an approximation on a GPU
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=row < num_rows, other=1.0))[:, None]
    if HAS_RESIDUAL:
        x = residual_out
    codes += first * codes_row_stride + rows * codes_row_stride
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    if HAS_DOWN:
        down += r[:, None] * down_row_stride
        acc = tl.full([ROWS, BLOCK_R], 0.0, tl.float32)
    if HAS_COUNTS:
        underflow = tl.full([ROWS, BLOCK_K], 0, tl.int32)
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
        normalized = (s * w[None, :] * scale).to(dtype)
        if HAS_DOWN:
            normalized = _opaque(normalized, PIN)
            down_tile = tl.load(down + start + k[None, :], mask=(r < RANK)[:, None] & inside, other=0.0)
            acc = tl.dot(normalized, tl.trans(down_tile), acc, input_precision="ieee")  # pyright: ignore[reportPossiblyUnboundVariable]
        if ROTATED:
            rotated = rotate_tile(normalized, hadamard, ROWS, BLOCK_K)  # pyright: ignore[reportPossiblyUnboundVariable]
            scaled = rotated * inverse
            encoded = encode_int8(scaled)
        else:
            scaled = normalized.to(tl.float32) * inverse
            encoded = scaled.to(codes.dtype.element_ty)
        tl.store(codes + start + k[None, :], encoded, mask=valid & inside)
        if HAS_COUNTS:
            if ROTATED:
                lost = (rotated != 0.0) & (tl.abs(scaled) <= 0.5)  # pyright: ignore[reportPossiblyUnboundVariable]
            else:
                lost = (scaled != 0.0) & (tl.abs(scaled) < 2**-6)
            underflow += lost.to(tl.int32)  # pyright: ignore[reportPossiblyUnboundVariable]
    if HAS_COUNTS:
        add_counts(counts, underflow, first, WIDTH, num_rows)  # pyright: ignore[reportPossiblyUnboundVariable]
    if HAS_DOWN:
        xa_out += first * R + rows * R
        tl.store(xa_out + r[None, :], acc.to(dtype), mask=valid & (r < R)[None, :])  # pyright: ignore[reportPossiblyUnboundVariable]
        for start in range(BLOCK_R, R, 16):
            tl.store(xa_out + start + tl.arange(0, 16)[None, :], tl.full([ROWS, 16], 0.0, dtype), mask=valid)


def rms_norm_quantize_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    *,
    down: Tensor | None = None,
    xa_out: Tensor | None = None,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    counts: Tensor | None = None,
    rows: int | None = None,
    block: int | None = None,
    block_k: int | None = None,
    num_warps: int = 8,
    num_stages: int = 3,
    sum_stages: int | None = None,
) -> Tensor:
    """Launch the kernel; the arguments are `rms_norm_quantize`'s, then these.

    `rows` per program, a power of two, with `down` from 16: more of them read `down` less often, but a cache holds
    them less well until they are read again; `block` columns per step of the sum of squares, `block_k` columns per
    step of codes and product (by default what registers and shared memory have room for), for int8 multiples of 64, and
    times `rows` from 1,024; `sum_stages` (by default 4,
    with a residual 3) and `num_stages` of software pipelining of the two.
    """
    num_rows, width = x.shape
    R = 16 if down is None else down.shape[0]
    rank = R if rank is None else rank
    _check(x, codes, scales, down, xa_out, rank, counts)
    assert (residual is None) == (residual_out is None), "residual and residual_out go together"
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    # tensor cores want 16 columns or more, Triton powers of two
    block_r = max(16, triton.next_power_of_2(rank))
    rotated = codes.dtype == torch.int8
    if down is None:
        # 16 elements a thread and step: a row at once or, where programs make H first, of more rows 512 columns each
        most = 512 if rotated else 512 * num_warps
        block = block or int(min(triton.next_power_of_2(width), most))
        rows = rows or max(1, 512 * num_warps // block)
        block_k = block_k or block
    else:
        rows = rows or 32
        # a thread's registers hold 16 sums of squares and as many largest values
        block = block or max(16, 512 * num_warps // rows)
        # with a tile of `down` of at most 32 KB, a multiprocessor has room for two programs of three stages; int8 takes
        # 64 columns, as the compiler divides both products of a step alike among warps: by columns where the one by H
        # has fewer rows than 64, else by rows, of which the one by `down` has too few (and registers spill on sm_80)
        most = 64 if rotated else min(256 // x.dtype.itemsize, 32768 // (block_r * x.dtype.itemsize))
        block_k = block_k or max(32, most)
    if sum_stages is None:
        sum_stages = 4 if residual is None else 3
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    _rms_norm_quantize_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        codes,
        scales,
        x if residual_out is None else residual_out,
        x if down is None else down,
        x if xa_out is None else xa_out,
        rstd,
        rstd if counts is None else counts,
        num_rows,
        eps,
        row_and_head_strides(x, x)[0],
        row_and_head_strides(x if residual is None else residual, x)[0],
        codes.stride(0),
        row_and_head_strides(x if residual_out is None else residual_out, x)[0],
        0 if down is None else down.stride(0),
        WIDTH=width,
        R=R,
        RANK=rank,
        ROTATED=rotated,
        HAS_DOWN=down is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_COUNTS=counts is not None,
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


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    down: Tensor | None,
    xa_out: Tensor | None,
    rank: int,
    counts: Tensor | None,
) -> None:
    """Assert what the kernel assumes of shapes, strides and dtypes."""
    num_rows, width = x.shape
    assert codes.shape == x.shape, (codes.shape, x.shape)
    assert codes.dtype in (E4M3, torch.int8), codes.dtype
    if codes.dtype == torch.int8:
        assert x.dtype == torch.bfloat16, f"int8 codes are of bfloat16, not of {x.dtype}"
        assert width % HADAMARD_BLOCK == 0, f"{width} columns: int8 takes only multiples of {HADAMARD_BLOCK}"
    assert x.stride(1) == codes.stride(1) == 1, "the last stride must be 1"
    assert scales.shape == (num_rows,), (scales.shape, x.shape)
    assert scales.dtype == torch.float32, scales.dtype
    assert scales.is_contiguous()
    assert counts is None or (counts.shape == (2,) and counts.dtype == torch.int64), counts
    assert (down is None) == (xa_out is None), "down and xa_out go together"
    if down is None or xa_out is None:
        return
    R = down.shape[0]
    assert down.shape == (R, width), (down.shape, x.shape)
    assert xa_out.shape == (num_rows, R), (xa_out.shape, x.shape, down.shape)
    assert R % 16 == 0, f"{R} columns: only multiples of 16"
    assert 0 <= rank <= R, f"rank {rank} of {R} columns"
    assert down.stride(1) == 1, "the last stride must be 1"
    assert xa_out.is_contiguous()
    assert x.dtype == down.dtype == xa_out.dtype, (x.dtype, down.dtype, xa_out.dtype)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    *,
    down: Tensor | None = None,
    xa_out: Tensor | None = None,
    rank: int | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Write `rms_norm` as FP8 or int8 codes with a scale per row, and its product with `down^T` to `xa_out`.

    The codes and the product are of the normalized values as rounded to the dtype; the product is summed in float32
    and rounded once. int8 codes are of these values rotated by blocks of 64 columns (`hadamard.py`), the product never
    is. In a row with infinity or NaN, the scale is NaN.

    Args:
        x: `[T, K]`, unit stride in the last dimension, any row stride; may be `residual_out`.
        weight: `[K]`.
        eps: Added to the mean square.
        codes: `[T, K]` of any row stride, `torch.float8_e4m3fn` or `torch.int8`: where the codes go. int8 is for `x` in
            bfloat16 with K a multiple of 64.
        scales: Float32 `[T]`: where the rows' scales go.
        down: `[R, K]` of any row stride, in the dtype of `x`; R is a multiple of 16. None: no product.
        xa_out: `[T, R]`, contiguous, in the dtype of `x`; given exactly if `down` is.
        rank: How many rows of `down` are not zero (only these need be read); all if not given.
        residual: What is added to `x` first, like `x`; may be `residual_out`.
        residual_out: Where the sum goes, like `x`; given exactly if `residual` is.
        counts: Int64 `[2]`: the number of values that underflow (for int8: rotated values that are not zero, but whose
            code is), and the number of values, are added to it.

    Returns:
        rstd, float32 `[T]`: what the backward pass needs.
    """
    if is_fake(x):
        return x.new_empty(len(x), dtype=torch.float32)
    if not use_triton(x):
        run = rms_norm_quantize_reference
    elif down is None or (x.dtype.itemsize == 2 and (down.shape[0] if rank is None else rank) <= 128):
        run = rms_norm_quantize_triton
    else:
        # float32 has no tensor cores here, and beyond 128 columns the product is no longer hidden behind memory
        _check(x, codes, scales, down, xa_out, 0, counts)
        normalized = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = rms_norm_triton(x, weight, eps, normalized, residual=residual, residual_out=residual_out)
        torch.mm(normalized, down.t(), out=xa_out)
        quantize_rows(normalized, codes, scales, counts=counts)
        return rstd
    return run(
        x,
        weight,
        eps,
        codes,
        scales,
        down=down,
        xa_out=xa_out,
        rank=rank,
        residual=residual,
        residual_out=residual_out,
        counts=counts,
    )
