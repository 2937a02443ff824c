"""Dequantize a 4-bit (NF4, FP4), int8 or plain weight, rotate it and encode it in int8, in one launch.

    out[n, k] = round(rot(bf16(W))[n, k] / row_scales[n])      within -127 .. 127

W are the float32 values of `lsr_scale.kernels.dequantize`, bit-equal to bitsandbytes', rounded to bfloat16 as they are
where products are computed in it; `rot` is the rotation of `lsr_scale.kernels.hadamard`, over blocks of 64 columns.
Bytes per weight: half a byte (4-bit) read and one written; the rotation is 128 FLOP of tensor cores.

A *vector* here is sixteen weights of a row, as in `dequantize_fp8`: a thread turns one 8-byte load into two 16-byte
stores to shared memory, from where tensor cores read. They leave two neighbouring columns of every eight in a thread;
H's columns are permuted so that it has sixteen neighbouring ones of the output, which it stores in one run.
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
from lsr_scale.kernels.dequantize_fp8 import check_matrix
from lsr_scale.kernels.hadamard import (
    BLOCK,
    encode_finite_int8,
    encode_int8_reference,
    hadamard_entries,
    rotate_reference,
)


def dequantize_4bit_rotated_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    row_scales: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
) -> None:
    """Do what `dequantize_4bit_rotated` does in plain torch."""
    _check(out, row_scales)
    _check_packed(packed, out)
    values = decode_4bit_reference(packed, absmax, code, out.numel(), block_size, nested)
    encode_rotated_reference(values.view(out.shape), out, row_scales)


def dequantize_int8_rotated_reference(codes: Tensor, code_scales: Tensor, out: Tensor, row_scales: Tensor) -> None:
    """Do what `dequantize_int8_rotated` does in plain torch."""
    _check(out, row_scales)
    check_matrix(codes, code_scales, tuple(out.shape))
    encode_rotated_reference(decode_int8_reference(codes, code_scales), out, row_scales)


def encode_rotated_reference(weight: Tensor, out: Tensor, row_scales: Tensor) -> None:
    """Do what `encode_rotated` does in plain torch."""
    _check(out, row_scales)
    check_matrix(weight, None, tuple(out.shape))
    out.copy_(encode_int8_reference(rotate_reference(weight.to(torch.bfloat16)), row_scales))


@jit
def _dequantize_rotated_kernel(
    weight,
    weight_row_stride,
    scales,
    code,
    absmax2,
    code2,
    offset,
    row_scales,
    out,
    out_row_stride,
    num_rows,
    KIND: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK2: tl.constexpr,
    ONE_OVER_127: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write the codes of VECTORS vectors of the flattened weight, four to a block of the rotation."""
    program = tl.program_id(0)
    vectors = program * VECTORS + tl.arange(0, VECTORS)
    valid = vectors < num_rows * ROW_VECTORS
    tables = (scales, code2, absmax2, offset)
    stored, scale = read_vectors(
        weight, weight_row_stride, tables, vectors, valid, KIND, NESTED, ROW_VECTORS, BLOCK_VECTORS, BLOCK2, 16
    )
    values = decode(stored, scale[:, None], code, KIND, ONE_OVER_127).to(tl.bfloat16)
    # the pair of columns 8 i + 2 j of the product is pair i of the output's run j
    position = tl.arange(0, 64)
    columns = position % 8 // 2 * 16 + position // 8 * 2 + position % 2
    hadamard = hadamard_entries(position[:, None], columns[None, :], tl.bfloat16)
    rotated = tl.dot(tl.reshape(values, (VECTORS // 4, 64)), hadamard)
    rotated = tl.permute(tl.reshape(rotated, (VECTORS // 4, 8, 4, 2)), (0, 2, 1, 3))
    rotated = tl.reshape(rotated, (VECTORS // 4, 64))
    # from here on of blocks
    BLOCKS: tl.constexpr = ROW_VECTORS // 4
    blocks = program * (VECTORS // 4) + tl.arange(0, VECTORS // 4)
    inside = blocks < num_rows * BLOCKS
    rows = blocks // BLOCKS
    inverse = tl.div_rn(1.0, tl.load(row_scales + rows, mask=inside, other=1.0))
    # a row with infinity or NaN has no finite scale: its codes do not matter
    codes = encode_finite_int8(rotated * (0.125 * inverse)[:, None])
    first = rows.to(tl.int64) * out_row_stride + blocks % BLOCKS * 64
    tl.store(out + first[:, None] + tl.arange(0, 64)[None, :], codes, mask=inside[:, None])


def _launch(
    weight: Tensor,
    scales: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    row_scales: Tensor,
    vectors: int,
    num_warps: int,
    **options: Any,
) -> None:
    """Launch the kernel, a program per run of vectors."""
    num_rows, in_features = out.shape
    row_vectors = in_features // 16
    _dequantize_rotated_kernel[(-(-num_rows * row_vectors // vectors),)](
        weight,
        weight.stride(0),
        scales,
        *tables,
        row_scales,
        out,
        out.stride(0),
        num_rows,
        ROW_VECTORS=row_vectors,
        ONE_OVER_127=ONE_OVER_127,
        VECTORS=vectors,
        num_warps=num_warps,
        # a fused multiply-add of code2 * absmax2 + offset would round once, bitsandbytes rounds twice
        enable_fp_fusion=False,
        **options,
    )


def dequantize_4bit_rotated_triton(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    row_scales: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    vectors: int = 1024,
    num_warps: int = 8,
) -> None:
    """Do what `dequantize_4bit_rotated` does in one Triton launch, for block sizes that are multiples of 16.

    Args:
        packed, absmax, code, out, row_scales, block_size, nested: As there.
        vectors: Vectors (of sixteen weights) per program, a power of two, at least 64.
        num_warps: Warps per program.
    """
    _check(out, row_scales)
    packed = _check_packed(packed, out)
    if block_size % 16 or not packed.is_contiguous() or packed.numel() >= 2**30:
        raise ValueError(
            f"expected a contiguous packed weight, and whole vectors of 16 in a block, got block size {block_size}"
        )
    absmax2, code2, offset, block_size2 = (absmax, code, code, 256) if nested is None else nested
    _launch(
        packed,
        absmax,
        (code, absmax2, code2, offset),
        out,
        row_scales,
        vectors,
        num_warps,
        KIND="4bit",
        NESTED=nested is not None,
        BLOCK_VECTORS=block_size // 16,
        BLOCK2=block_size2,
    )


def dequantize_int8_rotated_triton(
    codes: Tensor,
    code_scales: Tensor | None,
    out: Tensor,
    row_scales: Tensor,
    *,
    vectors: int = 1024,
    num_warps: int = 8,
) -> None:
    """Do what `dequantize_int8_rotated` does, or without `code_scales` `encode_rotated`, in one Triton launch.

    Args:
        codes, code_scales, out, row_scales: As there.
        vectors, num_warps: As in `dequantize_4bit_rotated_triton`.
    """
    _check(out, row_scales)
    check_matrix(codes, code_scales, tuple(out.shape))
    if codes.stride(1) != 1:
        raise ValueError(f"weight {tuple(codes.shape)}: expected unit column stride")
    scales = codes if code_scales is None else code_scales
    _launch(
        codes,
        scales,
        (scales, scales, scales, scales),
        out,
        row_scales,
        vectors,
        num_warps,
        KIND="copy" if code_scales is None else "int8",
        NESTED=False,
        BLOCK_VECTORS=1,
        BLOCK2=1,
    )


def _check(out: Tensor, row_scales: Tensor) -> None:
    """Raise unless the output takes codes of whole blocks, and there is a scale for each row of it."""
    if out.dtype != torch.int8 or out.dim() != 2 or out.stride(1) != 1 or out.shape[1] % BLOCK:
        raise ValueError(
            f"out: expected rows of int8 of unit column stride, a multiple of {BLOCK} columns, "
            f"got {out.dtype} {tuple(out.shape)}"
        )
    if row_scales.dtype != torch.float32 or row_scales.shape != out.shape[:1] or not row_scales.is_contiguous():
        raise ValueError(
            f"row_scales: expected {len(out)} contiguous in float32, got {row_scales.dtype} {tuple(row_scales.shape)}"
        )


def _check_packed(packed: Tensor, out: Tensor) -> Tensor:
    """Return the packed weight as bytes, or raise."""
    packed = packed.view(torch.uint8)
    if packed.numel() * 2 != out.numel():
        raise ValueError(f"packed weight of {packed.numel()} bytes does not fit out {tuple(out.shape)}")
    return packed


def dequantize_4bit_rotated(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    row_scales: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
) -> None:
    """Dequantize a 4-bit weight of bitsandbytes to rotated int8, `out = round(rot(bf16(W)) / row_scales)`.

    Args:
        packed: The packed weight, any shape: row-major `[N, K]`, two weights a byte, the first in the upper half.
        absmax: Scale of each quantization block, floating, or uint8 codes of it with `nested`.
        code: The 16 values of the table (NF4, FP4), float32.
        out: int8 `[N, K]`, K a multiple of 64, unit column stride: rows of a larger matrix. Fastest where its address
            and row stride are multiples of 16.
        row_scales: Float32 `[N]`, on the device: `int8_scale` of the largest magnitude of each row, rotated.
        block_size: Weights per quantization block.
        nested: `(absmax2, code2, offset, block_size2)` of a doubly quantized `absmax`; all tensors on the device.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    fits = use_triton(out, torch.bfloat16) and block_size % 16 == 0
    run = dequantize_4bit_rotated_triton if fits else dequantize_4bit_rotated_reference
    run(packed, absmax, code, out, row_scales, block_size=block_size, nested=nested)


def dequantize_int8_rotated(codes: Tensor, code_scales: Tensor, out: Tensor, row_scales: Tensor) -> None:
    """Dequantize an int8 weight with row scales to rotated int8, `out = round(rot(bf16(W)) / row_scales)`.

    Args:
        codes: int8 `[N, K]`, of the weight as it is.
        code_scales: `[N]`, the largest magnitude of each of its rows.
        out, row_scales: As in `dequantize_4bit_rotated`.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    run = dequantize_int8_rotated_triton if use_triton(out, torch.bfloat16) else dequantize_int8_rotated_reference
    run(codes, code_scales, out, row_scales)


def encode_rotated(weight: Tensor, out: Tensor, row_scales: Tensor) -> None:
    """Encode an unquantized weight in rotated int8, `out = round(rot(bf16(W)) / row_scales)`.

    Args:
        weight: floating `[N, K]`.
        out, row_scales: As in `dequantize_4bit_rotated`.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if use_triton(out, torch.bfloat16) and weight.stride(1) == 1:
        dequantize_int8_rotated_triton(weight, None, out, row_scales)
    else:
        encode_rotated_reference(weight, out, row_scales)
