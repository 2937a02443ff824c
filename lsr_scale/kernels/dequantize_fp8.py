"""Dequantize a 4-bit (NF4, FP4), int8 or plain weight straight to e4m3, as it is or transposed, in one launch.

    out[n, k] = e4m3(W[n, k] / weight_scale)          transposed: out[k, n]

W are the float32 values of `lsr_scale.kernels.dequantize`, bit-equal to bitsandbytes'. `weight_scale` is a power of
two, so that the division is exact and one rounding makes the code, to the nearest with ties to even; beyond 448 it
saturates. Both orientations have the same codes. Bytes per weight: half a byte (4-bit) read and one written, which
bounds the time.

A *vector* here is sixteen weights of a row: eight packed bytes, sixteen bytes of codes. A thread turns one 8-byte load
into one 16-byte store. Transposed, it holds vectors of four neighbouring rows, whose codes are neighbours in a column:
they cross the program's tile as 4-byte words, and go out 16 bytes a thread, the tile's rows in one run.
"""

# pyright: reportInvalidTypeForm=false

from typing import Any

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, use_triton
from lsr_scale.kernels.dequantize import (
    ONE_OVER_127,
    Nested,
    decode,
    decode_4bit_reference,
    decode_int8_reference,
    read_vectors,
)
from lsr_scale.kernels.fp8 import E4M3, encode_reference


def dequantize_4bit_fp8_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    weight_scale: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    transposed: bool = False,
) -> None:
    """Do what `dequantize_4bit_fp8` does in plain torch."""
    num_rows, in_features = _check(out, weight_scale, transposed)
    _check_packed(packed, num_rows, in_features)
    values = decode_4bit_reference(packed, absmax, code, num_rows * in_features, block_size, nested)
    encode_weight_reference(values.view(num_rows, in_features), out, weight_scale, transposed=transposed)


def dequantize_int8_fp8_reference(
    codes: Tensor, row_scales: Tensor, out: Tensor, weight_scale: Tensor, *, transposed: bool = False
) -> None:
    """Do what `dequantize_int8_fp8` does in plain torch."""
    check_matrix(codes, row_scales, _check(out, weight_scale, transposed))
    encode_weight_reference(decode_int8_reference(codes, row_scales), out, weight_scale, transposed=transposed)


def encode_weight_reference(weight: Tensor, out: Tensor, weight_scale: Tensor, *, transposed: bool = False) -> None:
    """Do what `encode_weight` does in plain torch."""
    check_matrix(weight, None, _check(out, weight_scale, transposed))
    codes = encode_reference(weight, weight_scale.view(1))
    out.copy_(codes.t() if transposed else codes)


@jit
def _side_by_side(parts):
    """Return four tensors as one with a last dimension of four, whose elements lie in one thread."""
    pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.reshape(pairs, parts[0].shape + (4,))


@jit
def _dequantize_fp8_kernel(
    weight,
    weight_row_stride,
    scales,
    code,
    absmax2,
    code2,
    offset,
    weight_scale,
    out,
    out_row_stride,
    num_rows,
    KIND: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK2: tl.constexpr,
    ONE_OVER_127: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the codes of VECTORS vectors of the flattened weight; transposed, of so many in each of ROWS rows."""
    program = tl.program_id(0)
    dtype = out.dtype.element_ty
    # of a power of two: exact; a scale multiplied by it moves its exponent only, and so do the values
    inverse = tl.div_rn(1.0, tl.load(weight_scale))
    tables = (scales, code2, absmax2, offset)
    if TRANSPOSED:
        TILES: tl.constexpr = (ROW_VECTORS + VECTORS - 1) // VECTORS
        COLUMNS: tl.constexpr = VECTORS * 16
        first_row = program // TILES * ROWS
        first_vector = program % TILES * VECTORS
        # of the vectors in every fourth row; the four rows of each are read one after the other
        nth = tl.arange(0, ROWS // 4 * VECTORS)
        row_vectors = first_vector + nth % VECTORS
        stored = ()
        scale = ()
        for fourth in tl.static_range(4):
            rows = first_row + nth // VECTORS * 4 + fourth
            valid = (rows < num_rows) & (row_vectors < ROW_VECTORS)
            vectors = rows * ROW_VECTORS + row_vectors
            part, part_scale = read_vectors(
                weight, weight_row_stride, tables, vectors, valid, KIND, NESTED, ROW_VECTORS, BLOCK_VECTORS, BLOCK2, 16
            )
            stored = stored + (part,)
            scale = scale + (part_scale * inverse,)
        values = decode(_side_by_side(stored), _side_by_side(scale)[:, None, :], code, KIND, ONE_OVER_127)
        tile = tl.reshape(values.to(dtype), (ROWS // 4, COLUMNS, 4))
        tile = tl.reshape(tl.permute(tile, (1, 0, 2)), (COLUMNS, ROWS))
        columns = (first_vector * 16 + tl.arange(0, COLUMNS))[:, None]
        rows = (first_row + tl.arange(0, ROWS))[None, :]
        inside = (columns < ROW_VECTORS * 16) & (rows < num_rows)
        tl.store(out + columns.to(tl.int64) * out_row_stride + rows, tile, mask=inside)
    else:
        vectors = program * VECTORS + tl.arange(0, VECTORS)
        valid = vectors < num_rows * ROW_VECTORS
        stored, scale = read_vectors(
            weight, weight_row_stride, tables, vectors, valid, KIND, NESTED, ROW_VECTORS, BLOCK_VECTORS, BLOCK2, 16
        )
        values = decode(stored, (scale * inverse)[:, None], code, KIND, ONE_OVER_127)
        first = (vectors // ROW_VECTORS).to(tl.int64) * out_row_stride + vectors % ROW_VECTORS * 16
        tl.store(out + first[:, None] + tl.arange(0, 16)[None, :], values.to(dtype), mask=valid[:, None])


def _launch(
    weight: Tensor,
    scales: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    weight_scale: Tensor,
    transposed: bool,
    vectors: int | None,
    rows: int,
    num_warps: int,
    **options: Any,
) -> None:
    """Launch the kernel, a program per run of vectors or, transposed, per tile."""
    num_rows, in_features = out.shape[::-1] if transposed else out.shape
    row_vectors = in_features // 16
    # a tile of 128 rows and 256 columns crosses in the dtype of the weight: at most 64 KiB
    vectors = vectors or (min(16, 32 // weight.element_size()) if transposed else 1024)
    if transposed:
        programs = -(-num_rows // rows) * -(-row_vectors // vectors)
    else:
        programs = -(-num_rows * row_vectors // vectors)
    _dequantize_fp8_kernel[(programs,)](
        weight,
        weight.stride(0),
        scales,
        *tables,
        weight_scale,
        out,
        out.stride(0),
        num_rows,
        TRANSPOSED=transposed,
        ROW_VECTORS=row_vectors,
        ONE_OVER_127=ONE_OVER_127,
        VECTORS=vectors,
        ROWS=rows,
        num_warps=num_warps,
        # a fused multiply-add of code2 * absmax2 + offset would round once, bitsandbytes rounds twice
        enable_fp_fusion=False,
        **options,
    )


def dequantize_4bit_fp8_triton(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    weight_scale: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    transposed: bool = False,
    vectors: int | None = None,
    rows: int = 128,
    num_warps: int = 8,
) -> None:
    """Do what `dequantize_4bit_fp8` does in one Triton launch, for K and block sizes that are multiples of 16.

    Args:
        packed, absmax, code, out, weight_scale, block_size, nested, transposed: As there.
        vectors: Vectors (of sixteen weights) per program, a power of two; transposed, per row of its tile.
        rows: Rows of the weight per program, transposed: a power of two, bytes in one run of the output.
        num_warps: Warps per program.
    """
    num_rows, in_features = _check(out, weight_scale, transposed)
    packed = _check_packed(packed, num_rows, in_features)
    if in_features % 16 or block_size % 16 or not packed.is_contiguous() or packed.numel() >= 2**30:
        raise ValueError(
            "expected a contiguous packed weight, and whole vectors of 16 in a row and in a block, got "
            f"{in_features} columns and block size {block_size}"
        )
    absmax2, code2, offset, block_size2 = (absmax, code, code, 256) if nested is None else nested
    _launch(
        packed,
        absmax,
        (code, absmax2, code2, offset),
        out,
        weight_scale,
        transposed,
        vectors,
        rows,
        num_warps,
        KIND="4bit",
        NESTED=nested is not None,
        BLOCK_VECTORS=block_size // 16,
        BLOCK2=block_size2,
    )


def dequantize_int8_fp8_triton(
    codes: Tensor,
    row_scales: Tensor | None,
    out: Tensor,
    weight_scale: Tensor,
    *,
    transposed: bool = False,
    vectors: int | None = None,
    rows: int = 128,
    num_warps: int = 8,
) -> None:
    """Do what `dequantize_int8_fp8` does, or without `row_scales` `encode_weight`, in one Triton launch.

    Args:
        codes, row_scales, out, weight_scale, transposed: As there; K is a multiple of 16.
        vectors, rows, num_warps: As in `dequantize_4bit_fp8_triton`.
    """
    check_matrix(codes, row_scales, _check(out, weight_scale, transposed))
    if codes.shape[1] % 16 or codes.stride(1) != 1:
        raise ValueError(f"weight {tuple(codes.shape)}: expected unit column stride and whole vectors of 16 in a row")
    scales = codes if row_scales is None else row_scales
    _launch(
        codes,
        scales,
        (scales, scales, scales, scales),
        out,
        weight_scale,
        transposed,
        vectors,
        rows,
        num_warps,
        KIND="copy" if row_scales is None else "int8",
        NESTED=False,
        BLOCK_VECTORS=1,
        BLOCK2=1,
    )


def _check(out: Tensor, weight_scale: Tensor, transposed: bool) -> tuple[int, int]:
    """Return the weight's N and K that `out` is for, or raise."""
    if out.dtype != E4M3 or out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(f"out: expected rows of {E4M3} of unit column stride, got {out.dtype} {tuple(out.shape)}")
    if weight_scale.dtype != torch.float32 or weight_scale.numel() != 1:
        raise ValueError(f"weight_scale: expected one float32, got {weight_scale.dtype} {tuple(weight_scale.shape)}")
    num_rows, in_features = out.shape[::-1] if transposed else out.shape
    return num_rows, in_features


def _check_packed(packed: Tensor, num_rows: int, in_features: int) -> Tensor:
    """Return the packed weight as bytes, or raise."""
    packed = packed.view(torch.uint8)
    # the last byte may hold one weight only
    if packed.numel() != -(-num_rows * in_features // 2):
        raise ValueError(f"packed weight of {packed.numel()} bytes does not fit {num_rows} rows of {in_features}")
    return packed


def check_matrix(weight: Tensor, row_scales: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless the weight has that shape, and the scales are one per row."""
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit out, which is for {shape}")
    if row_scales is not None and (weight.dtype != torch.int8 or row_scales.numel() != len(weight)):
        raise ValueError(f"expected int8 codes and {len(weight)} scales, got {weight.dtype} and {row_scales.numel()}")


def _use_triton(out: Tensor, in_features: int, block_size: int = 16) -> bool:
    """Tell whether the kernel runs: on a GPU, rows and blocks of whole vectors."""
    return in_features % 16 == 0 and block_size % 16 == 0 and use_triton(out, torch.float32)


def dequantize_4bit_fp8(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    weight_scale: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    transposed: bool = False,
) -> None:
    """Dequantize a 4-bit weight of bitsandbytes to e4m3, `out = e4m3(W / weight_scale)`.

    Args:
        packed: The packed weight, any shape: row-major `[N, K]`, two weights a byte, the first in the upper half.
        absmax: Scale of each quantization block, floating, or uint8 codes of it with `nested`.
        code: The 16 values of the table (NF4, FP4), float32.
        out: `[N, K]`, or with `transposed` `[K, N]`, float8_e4m3fn, unit column stride: rows or columns of a larger
            matrix. Fastest where its address and row stride are multiples of 16.
        weight_scale: A power of two, float32 `[1]`, on the device.
        block_size: Weights per quantization block.
        nested: `(absmax2, code2, offset, block_size2)` of a doubly quantized `absmax`; all tensors on the device.
        transposed: Write the transpose.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    fits = _use_triton(out, out.shape[0 if transposed else 1], block_size)
    run = dequantize_4bit_fp8_triton if fits else dequantize_4bit_fp8_reference
    run(packed, absmax, code, out, weight_scale, block_size=block_size, nested=nested, transposed=transposed)


def dequantize_int8_fp8(
    codes: Tensor, row_scales: Tensor, out: Tensor, weight_scale: Tensor, *, transposed: bool = False
) -> None:
    """Dequantize an int8 weight with row scales to e4m3, `out = e4m3(W / weight_scale)`.

    Args:
        codes: int8 `[N, K]`.
        row_scales: `[N]`, the largest magnitude of each row.
        out, weight_scale, transposed: As in `dequantize_4bit_fp8`.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    fits = _use_triton(out, codes.shape[1])
    run = dequantize_int8_fp8_triton if fits else dequantize_int8_fp8_reference
    run(codes, row_scales, out, weight_scale, transposed=transposed)


def encode_weight(weight: Tensor, out: Tensor, weight_scale: Tensor, *, transposed: bool = False) -> None:
    """Encode an unquantized weight in e4m3, `out = e4m3(W / weight_scale)`.

    Args:
        weight: floating `[N, K]`.
        out, weight_scale, transposed: As in `dequantize_4bit_fp8`.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if _use_triton(out, weight.shape[1]) and weight.stride(1) == 1:
        dequantize_int8_fp8_triton(weight, None, out, weight_scale, transposed=transposed)
    else:
        encode_weight_reference(weight, out, weight_scale, transposed=transposed)
