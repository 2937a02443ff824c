"""Rows quantized to 8 bits and, from nearly the same read, their product with the stacked projections of adapters.

The dtype of the codes says which format:

    e4m3    scales[t] = power_of_two_scale(max_k |x[t, k]|),  codes[t] = e4m3(x[t] / scales[t])      (`fp8.py`)
    int8    scales[t] = max_k |rotated[t, k]| / 127,          codes[t] = round(rotated[t] / scales[t])

    rotated[t] = x[t] H / 8  in blocks of 64 columns, H a Hadamard matrix                       (`hadamard.py`)
    product = x @ projection^T                                                                  [T, R]

The product is of x itself, so neither needs the other: some programs quantize whole rows, others multiply, and those of
the same rows run at about the same time, so that the second read of x comes from the L2 cache however long rows are.
A product's program owns a range of columns; where there are several, the partial products are stored in float32, and a
second kernel sums them in a fixed order. Bytes per element of a 16-bit dtype: 3. Beside that, with several ranges, 8
per range and element of the product, and `T / ROWS` reads of `projection`, which come from the L2 cache.

The rotation is a product on tensor cores, of what was loaded: nothing rotated is stored but as codes. A row that does
not fit into registers is read and rotated twice, for its largest value and for its codes: blocks do not depend on each
other.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels import hadamard
from lsr_scale.kernels.backend import is_fake, jit, row_max, row_sum, tl, triton, use_triton
from lsr_scale.kernels.fp8 import E4M3, SMALLEST_NORMAL, encode_reference, power_of_two_scale, scale_of


def quantize_rows_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    counts: Tensor | None = None,
    projection: Tensor | None = None,
    product: Tensor | None = None,
    rank: int | None = None,
) -> None:
    """Compute `quantize_rows` in plain torch."""
    if codes.dtype == torch.int8:
        rotated = hadamard.rotate_reference(x)
        scales.copy_(hadamard.int8_scale(rotated.abs().amax(1)))
        codes.copy_(hadamard.encode_int8_reference(rotated, scales))
        underflow = (rotated != 0) & (codes == 0) & scales.isfinite().unsqueeze(1)
    else:
        scales.copy_(power_of_two_scale(x.abs().amax(1)))
        codes.copy_(encode_reference(x, scales))
        underflow = (x != 0) & (x.float().abs() < SMALLEST_NORMAL * scales.unsqueeze(1))
    if counts is not None:
        counts[0] += underflow.sum()
        counts[1] += x.numel()
    if projection is not None:
        assert product is not None
        product.copy_(x.float() @ projection.float().t())


@jit
def _underflow(values, scale):
    """Return 1 for values that are not zero, but below e4m3's smallest normal value, 2^-6, times the scale; else 0."""
    wide = tl.abs(values.to(tl.float32))
    return ((wide != 0.0) & (wide < scale * 0.015625)).to(tl.int32)


@jit
def _rounds_to_zero(scaled):
    """Return 1 for values that are not zero, but whose integer code is; else 0."""
    return ((scaled != 0.0) & (tl.abs(scaled) <= 0.5)).to(tl.int32)


@jit
def add_counts(counts, underflow, first, WIDTH: tl.constexpr, num_rows):
    """Add a program's underflow to the counts and, from the program whose first row is 0, the number of all values."""
    # as one row: of rows reduced one after the other, Triton 3.6 fails to compile values from tensor cores for sm_100
    total = tl.reduce(tl.reshape(underflow.to(tl.int32), (1, underflow.numel)), 1, row_sum)
    tl.atomic_add(counts + tl.arange(0, 1), total.to(tl.int64), sem="relaxed")
    if first == 0:
        tl.atomic_add(counts + 1, tl.full([], WIDTH, tl.int64) * num_rows, sem="relaxed")


@jit
def _quantize(
    x,
    codes,
    scales,
    counts,
    first,
    num_rows,
    x_row_stride,
    codes_row_stride,
    WIDTH: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    LAST_READ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize ROWS rows to e4m3; those of at most BLOCK columns are read once, longer ones twice.

    LAST_READ is the eviction policy of the last read: the product's may come after it.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    valid = first + rows < num_rows
    x += first * x_row_stride + rows * x_row_stride
    codes += first * codes_row_stride + rows * codes_row_stride
    # magnitudes are compared as integers, which order them alike, with infinity and NaN above all
    magnitude_bits: tl.constexpr = 0x7FFF
    steps: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if steps == 1:
        mask = valid & (columns < WIDTH)
        values = tl.load(x + columns, mask=mask, other=0.0, eviction_policy=LAST_READ)
        bits = values.to(tl.int16, bitcast=True) & magnitude_bits
    else:
        bits = tl.full([ROWS, BLOCK], 0, tl.int16)
        for step in range(steps):
            mask = valid & (step * BLOCK + columns < WIDTH)
            values = tl.load(x + step * BLOCK + columns, mask=mask, other=0.0)
            bits = tl.maximum(bits, values.to(tl.int16, bitcast=True) & magnitude_bits)
    largest = tl.reduce(bits, 1, row_max).to(x.dtype.element_ty, bitcast=True)[:, None]
    scale = scale_of(largest.to(tl.float32))
    # exact: `1.0 / scale` is an approximation on a GPU
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + first + rows, scale, mask=valid)
    if steps == 1:
        tl.store(codes + columns, (values.to(tl.float32) * inverse).to(codes.dtype.element_ty), mask=mask)
        underflow = _underflow(values, scale)
    else:
        underflow = tl.full([ROWS, BLOCK], 0, tl.int32)
        for step in range(steps):
            # backwards: what was read last is the most likely to be in the cache
            start = (steps - 1 - step) * BLOCK
            mask = valid & (start + columns < WIDTH)
            values = tl.load(x + start + columns, mask=mask, other=0.0, eviction_policy=LAST_READ)
            encoded = (values.to(tl.float32) * inverse).to(codes.dtype.element_ty)
            tl.store(codes + start + columns, encoded, mask=mask)
            if HAS_COUNTS:
                underflow += _underflow(values, scale)
    if HAS_COUNTS:
        add_counts(counts, underflow, first, WIDTH, num_rows)


@jit
def _quantize_int8(
    x,
    codes,
    scales,
    counts,
    first,
    num_rows,
    x_row_stride,
    codes_row_stride,
    WIDTH: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    LAST_READ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate and quantize ROWS rows to int8; those of at most BLOCK columns are read once, longer ones twice.

    Columns beyond a row's end are zeros, and as WIDTH is a multiple of 64, so they are rotated.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    valid = first + rows < num_rows
    x += first * x_row_stride + rows * x_row_stride
    codes += first * codes_row_stride + rows * codes_row_stride
    matrix = hadamard.hadamard_tile(x.dtype.element_ty)
    # magnitudes are compared as integers, which order them alike, with infinity and NaN above all
    magnitude_bits: tl.constexpr = 0x7FFFFFFF
    steps: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if steps == 1:
        mask = valid & (columns < WIDTH)
        values = tl.load(x + columns, mask=mask, other=0.0, eviction_policy=LAST_READ)
        rotated = hadamard.rotate_tile(values, matrix, ROWS, BLOCK)
        bits = rotated.to(tl.int32, bitcast=True) & magnitude_bits
    else:
        bits = tl.full([ROWS, BLOCK], 0, tl.int32)
        for step in range(steps):
            mask = valid & (step * BLOCK + columns < WIDTH)
            values = tl.load(x + step * BLOCK + columns, mask=mask, other=0.0)
            rotated = hadamard.rotate_tile(values, matrix, ROWS, BLOCK)
            bits = tl.maximum(bits, rotated.to(tl.int32, bitcast=True) & magnitude_bits)
    scale = hadamard.int8_scale_of(tl.reduce(bits, 1, row_max).to(tl.float32, bitcast=True))[:, None]
    # exact: `1.0 / scale` is an approximation on a GPU
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + first + rows, scale, mask=valid)
    if steps == 1:
        scaled = rotated * inverse
        tl.store(codes + columns, hadamard.encode_int8(scaled), mask=mask)
        underflow = _rounds_to_zero(scaled)
    else:
        underflow = tl.full([ROWS, BLOCK], 0, tl.int32)
        for step in range(steps):
            # backwards: what was read last is the most likely to be in the cache
            start = (steps - 1 - step) * BLOCK
            mask = valid & (start + columns < WIDTH)
            values = tl.load(x + start + columns, mask=mask, other=0.0, eviction_policy=LAST_READ)
            scaled = hadamard.rotate_tile(values, matrix, ROWS, BLOCK) * inverse
            tl.store(codes + start + columns, hadamard.encode_int8(scaled), mask=mask)
            if HAS_COUNTS:
                underflow += _rounds_to_zero(scaled)
    if HAS_COUNTS:
        add_counts(counts, underflow, first, WIDTH, num_rows)


@jit
def _multiply(
    x,
    projection,
    product,
    first,
    split,
    num_rows,
    x_row_stride,
    projection_row_stride,
    product_row_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Multiply one range of STEPS * BLOCK_K columns of ROWS rows; columns of the product beyond BLOCK_R are zero."""
    dtype = product.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    r = tl.arange(0, BLOCK_R)
    valid = first + rows < num_rows
    x += first * x_row_stride + rows * x_row_stride
    projection += r[:, None] * projection_row_stride
    acc = tl.full([ROWS, BLOCK_R], 0.0, tl.float32)
    for step in range(STEPS):
        columns = (split * STEPS + step) * BLOCK_K + k
        inside = columns < WIDTH
        # masked elements are zero in both operands
        values = tl.load(x + columns, mask=valid & inside, other=0.0)
        projection_tile = tl.load(projection + columns, mask=(r < RANK)[:, None] & inside, other=0.0)
        acc = tl.dot(values, tl.trans(projection_tile), acc, input_precision="ieee")
    product += (split.to(tl.int64) * num_rows + first) * product_row_stride + rows * product_row_stride
    tl.store(product + r[None, :], acc.to(dtype), mask=valid & (r < R)[None, :])
    for start in range(BLOCK_R, R, 16):
        rest = start + tl.arange(0, 16)[None, :]
        tl.store(product + rest, tl.full([ROWS, 16], 0.0, dtype), mask=valid)


@jit
def _quantize_rows_kernel(
    x,
    codes,
    scales,
    counts,
    projection,
    product,
    num_rows,
    x_row_stride,
    codes_row_stride,
    projection_row_stride,
    product_row_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For every ROWS rows, SPLITS programs multiply one range of columns each, then others quantize QUANTIZE_ROWS each.

    Without a product SPLITS is 0, and ROWS is QUANTIZE_ROWS.
    """
    programs: tl.constexpr = SPLITS + ROWS // QUANTIZE_ROWS
    index = tl.program_id(0) % programs
    # 64 bits: tokens times row stride exceeds 2^31 for long batches
    first = (tl.program_id(0) // programs).to(tl.int64) * ROWS
    if index < SPLITS:
        _multiply(
            x,
            projection,
            product,
            first,
            index,
            num_rows,
            x_row_stride,
            projection_row_stride,
            product_row_stride,
            WIDTH,
            R,
            RANK,
            STEPS,
            ROWS,
            BLOCK_K,
            BLOCK_R,
        )
    else:
        first += (index - SPLITS) * QUANTIZE_ROWS
        quantize: tl.constexpr = _quantize_int8 if codes.dtype.element_ty == tl.int8 else _quantize
        quantize(
            x,
            codes,
            scales,
            counts,
            first,
            num_rows,
            x_row_stride,
            codes_row_stride,
            WIDTH,
            HAS_COUNTS,
            "evict_first" if SPLITS == 0 else "",
            QUANTIZE_ROWS,
            BLOCK,
        )


@jit
def _sum_partials_kernel(
    partials,
    product,
    num_rows,
    product_row_stride,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK elements of the product over the ranges of columns; columns from BLOCK_R on become zero."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // R
    column = index % R
    valid = row < num_rows
    partials += row * BLOCK_R + column
    stride = tl.full([], BLOCK_R, tl.int64) * num_rows
    total = tl.full([BLOCK], 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + split * stride, mask=valid & (column < BLOCK_R), other=0.0)
    tl.store(product + row * product_row_stride + column, total.to(product.dtype.element_ty), mask=valid)


def quantize_rows_triton(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    counts: Tensor | None = None,
    projection: Tensor | None = None,
    product: Tensor | None = None,
    rank: int | None = None,
    rows: int = 32,
    quantize_rows: int | None = None,
    block: int | None = None,
    block_k: int | None = None,
    splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 3,
) -> None:
    """Launch the kernels; the arguments are `quantize_rows`'s, then these.

    `rows` of a program of the product, a power of two from 16; `quantize_rows` of one that quantizes, a power of two up
    to `rows`, and `block` columns that it reads at once, a power of two (by default a whole row of up to 8,192, of
    int8 what registers have room for), with int8 at least 1,024 elements together;
    `block_k` columns per step of the product, by default chosen from the rank; `splits` ranges of columns (by default
    of about 4,096, of long rows 2,048); `num_stages` of software pipelining.
    """
    num_rows, width = x.shape
    _check(x, codes, scales, counts, projection, product, rank)
    rotate = codes.dtype == torch.int8
    # of e4m3 chosen by timing widths of 4,096 to 28,672 on an H200; of int8 such that the float32 values of a program
    # leave registers for several others
    long = 4096 < width <= 8192
    if num_warps is None:
        alone = (8 if long else 4) if rotate else (16 if width <= 4096 else 8)
        num_warps = alone if projection is None else 4
    block = block or min(int(triton.next_power_of_2(width)), 1024 * num_warps if rotate else 8192)
    if quantize_rows is None:
        # 32 elements per thread, 64 of 16 bits in a long row that is read once
        elements = 2048 if long and projection is None and not rotate else 1024
        quantize_rows = min(rows, max(1, elements * num_warps // block))
    # tensor cores want 16 blocks of 64 columns or more
    assert not rotate or quantize_rows * block >= 1024, (quantize_rows, block)
    out, partials, R = product, None, 0
    num_splits, steps, block_r = 0, 1, 16
    if projection is None:
        rows, rank, block_k = quantize_rows, 0, 16
    else:
        R = len(projection)
        rank = R if rank is None else rank
        # tensor cores want 16 columns or more, Triton powers of two
        block_r = max(16, triton.next_power_of_2(rank))
        # with a tile of `projection` of at most 8 KB, a multiprocessor has room for several programs of three stages
        block_k = block_k or max(32, min(128, 8192 // (block_r * x.dtype.itemsize)))
        blocks = triton.cdiv(width, block_k)
        # short enough that the rows are still in the cache when their last range is read
        steps = triton.cdiv(blocks, splits or triton.cdiv(width, 4096 if width <= 8192 else 2048))
        num_splits = triton.cdiv(blocks, steps)
        if num_splits > 1:
            out = partials = torch.empty(num_splits, num_rows, block_r, dtype=torch.float32, device=x.device)
    programs = triton.cdiv(num_rows, rows) * (num_splits + rows // quantize_rows)
    _quantize_rows_kernel[(programs,)](
        x,
        codes,
        scales,
        scales if counts is None else counts,
        x if projection is None else projection,
        x if out is None else out,
        num_rows,
        x.stride(0),
        codes.stride(0),
        x.stride(0) if projection is None else projection.stride(0),
        x.stride(0) if out is None else out.stride(-2),
        WIDTH=width,
        R=R if partials is None else block_r,
        RANK=rank,
        SPLITS=num_splits,
        STEPS=steps,
        HAS_COUNTS=counts is not None,
        ROWS=rows,
        QUANTIZE_ROWS=quantize_rows,
        BLOCK=block,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if partials is not None:
        assert product is not None
        _sum_partials_kernel[(triton.cdiv(num_rows * R, 512),)](
            partials,
            product,
            num_rows,
            product.stride(0),
            R=R,
            SPLITS=num_splits,
            BLOCK_R=block_r,
            BLOCK=512,
            num_warps=4,
        )


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    counts: Tensor | None,
    projection: Tensor | None,
    product: Tensor | None,
    rank: int | None,
) -> None:
    """Assert what the kernels assume of shapes, strides and dtypes."""
    assert x.dtype.itemsize == 2, x.dtype
    assert codes.shape == x.shape, (codes.shape, x.shape)
    assert codes.dtype in (E4M3, torch.int8), codes.dtype
    if codes.dtype == torch.int8:
        assert x.shape[1] % hadamard.BLOCK == 0, f"{x.shape[1]} columns: only multiples of {hadamard.BLOCK} for int8"
    assert x.stride(1) == codes.stride(1) == 1, "the last stride must be 1"
    assert scales.shape == (len(x),), (scales.shape, x.shape)
    assert scales.is_contiguous()
    assert scales.dtype == torch.float32, scales.dtype
    if counts is not None:
        assert counts.shape == (2,), counts.shape
        assert counts.is_contiguous()
        assert counts.dtype == torch.int64, counts.dtype
    assert (projection is None) == (product is None), "projection and product go together"
    if projection is not None and product is not None:
        R = len(projection)
        assert projection.shape == (R, x.shape[1]), (projection.shape, x.shape)
        assert product.shape == (len(x), R), (product.shape, projection.shape)
        assert R % 16 == 0, f"{R} columns: only multiples of 16"
        assert 0 <= (R if rank is None else rank) <= R, f"rank {rank} of {R} columns"
        assert projection.stride(1) == product.stride(1) == 1, "the last stride must be 1"
        assert x.dtype == projection.dtype == product.dtype, (x.dtype, projection.dtype, product.dtype)


def quantize_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    counts: Tensor | None = None,
    projection: Tensor | None = None,
    product: Tensor | None = None,
    rank: int | None = None,
) -> None:
    """Write the 8-bit codes of `x` with one scale per row, and the product `x @ projection^T` of `x` itself.

    To e4m3, a row's scale is the smallest power of two with which nothing saturates. To int8, codes are of `x` rotated
    in blocks of 64 columns, and a row's scale is its largest rotated value over 127. With infinity or NaN in a row its
    scale is NaN, and so are its codes in e4m3. The product is of `x` as it is, never rotated; it is summed in float32
    and rounded once. Matrices may have any row stride.

    Args:
        x: `[T, K]`, bfloat16 or float16; for int8 K is a multiple of 64.
        codes: `[T, K]`, float8_e4m3fn or int8: the format.
        scales: `[T]`, float32.
        counts: int64 `[2]`, to which are added the number of values that underflow (to e4m3, not zero, but below 2^-6
            times their scale: their code is zero or has fewer bits; to int8, rotated values that are not zero, but
            whose code is) and the number of values; not counted if not given.
        projection: `[R, K]`, in the dtype of `x`; R is a multiple of 16.
        product: `[T, R]`, in the dtype of `x`; given exactly if `projection` is.
        rank: How many rows of `projection` are not zero (only these need be read); all if not given.
    """
    if is_fake(x):
        return
    if not use_triton(x):
        quantize_rows_reference(x, codes, scales, counts=counts, projection=projection, product=product, rank=rank)
    elif projection is None or (len(projection) if rank is None else rank) <= 128:
        quantize_rows_triton(x, codes, scales, counts=counts, projection=projection, product=product, rank=rank)
    else:
        # beyond 128 columns the product is no longer hidden behind memory
        _check(x, codes, scales, counts, projection, product, 0)
        assert product is not None
        quantize_rows_triton(x, codes, scales, counts=counts)
        torch.mm(x, projection.t(), out=product)
