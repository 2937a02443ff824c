"""Dequantize a 4-bit (NF4, FP4) or int8 weight into `[W | up; down]`, beside its adapter's pair, in one launch.

    out = [ W | 0 | up | 0 ]   rows 0..N: the weight in K columns, then R columns that hold `up` and zeros
    down_out = [ down ; 0 ]    r2 rows of K columns, padded with rows of zeros

    4-bit: W.flat[i] = code[q_i] * absmax[i // block_size]
           where, doubly quantized, absmax[b] = code2[a_b] * absmax2[b // block_size2] + offset
    int8:  W[n, k] = codes[n, k] * row_scales[n] * (1 / 127)

Values are bit-equal to those of bitsandbytes: float32, each operation rounded by itself (no fused multiply-add), in its
order, then rounded once to the dtype of `out`. Bytes per weight: half a byte (4-bit) or one (int8) read and two (bf16)
written, which bounds the time. Blocks of quantization run over the flattened weight and may straddle its rows.

A *vector* here is eight weights of a row: four packed bytes, sixteen bytes of bf16. A thread turns one 4-byte load into
one 16-byte store, both coalesced.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, use_triton

# absmax (fp32), code (fp32 [256]), offset (fp32, one element) and block size of a doubly quantized absmax
Nested = tuple[Tensor, Tensor, Tensor, int]


class Extension(NamedTuple):
    """An adapter's pair of a weight `[N, K]`, and where it is written: `up` in `tail [N, R]`, `down` in `down_out`.

    Attributes:
        up: `[N, r]`, written to the columns up_column .. of the tail; its others become zero.
        up_column: Where among the tail's R columns `up` begins.
        down: `[r, K]`, written to the first rows of `down_out`; its others become zero.
        down_out: `[r2 >= r, K]`, unit column stride, in the dtype of the tail, or None for nothing.
    """

    up: Tensor | None = None
    up_column: int = 0
    down: Tensor | None = None
    down_out: Tensor | None = None

    def check(self, tail: Tensor, in_features: int | None = None) -> None:
        """Raise ValueError unless the pair fits where it is to go; `in_features` is K where a weight says it."""
        up, down, down_out = self.up, self.down, self.down_out
        if tail.dim() != 2 or (tail.stride(1) != 1 < tail.shape[1]):
            raise ValueError(f"tail: expected rows of unit column stride, got {tuple(tail.shape)}")
        if up is not None:
            last = self.up_column + up.shape[1]
            if up.shape[0] != tail.shape[0] or last > tail.shape[1] or (up.stride(1) != 1 < up.shape[1]):
                raise ValueError(
                    f"up {tuple(up.shape)} at column {self.up_column} does not fit the tail {tuple(tail.shape)}"
                )
        if down_out is None:
            if down is not None:
                raise ValueError("down: given without down_out")
            return
        expected = down_out.shape[1] if in_features is None else in_features
        if down_out.shape[1] != expected or down_out.stride(1) != 1 or down_out.dtype != tail.dtype:
            raise ValueError(
                f"down_out {tuple(down_out.shape)} {down_out.dtype}: expected {expected} columns, {tail.dtype}"
            )
        if down is not None and (down.shape[1] != expected or down.shape[0] > down_out.shape[0] or down.stride(1) != 1):
            raise ValueError(f"down {tuple(down.shape)} does not fit down_out {tuple(down_out.shape)}")


NOTHING = Extension()

# float64 for the references
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fill_extension_reference(tail: Tensor, extension: Extension, in_features: int | None = None) -> None:
    """Do what `fill_extension` does in plain torch; `in_features` is K where a weight says it."""
    extension.check(tail, in_features)
    up, up_column, down, down_out = extension
    tail.zero_()
    if up is not None:
        tail[:, up_column : up_column + up.shape[1]] = up
    if down_out is not None:
        rank = 0 if down is None else down.shape[0]
        if down is not None:
            down_out[:rank] = down
        down_out[rank:] = 0


def dequantize_4bit_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    extension: Extension = NOTHING,
) -> None:
    """Do what `dequantize_4bit` does in plain torch."""
    packed, in_features = _check_4bit(packed, out, block_size)
    values = decode_4bit_reference(packed, absmax, code, out.shape[0] * in_features, block_size, nested)
    out[:, :in_features] = values.view(-1, in_features).to(out.dtype)
    fill_extension_reference(out[:, in_features:], extension, in_features)


def decode_4bit_reference(
    packed: Tensor, absmax: Tensor, code: Tensor, num_values: int, block_size: int, nested: Nested | None = None
) -> Tensor:
    """Return the first `num_values` of a 4-bit weight in float32, flat: of any number, also in half a byte."""
    scales = block_scales(absmax, nested)
    flat = packed.view(torch.uint8).view(-1, 1)
    halves = torch.cat((flat >> 4, flat & 15), dim=1).view(-1)[:num_values]
    return code.float().index_select(0, halves.int()) * scales.repeat_interleave(block_size)[:num_values]


def block_scales(absmax: Tensor, nested: Nested | None = None) -> Tensor:
    """Return the scale of each quantization block in float32, flat."""
    if nested is None:
        return absmax.float().view(-1)
    absmax2, code2, offset, block_size2 = nested
    codes = code2.float().index_select(0, absmax.view(-1).int())
    return codes * absmax2.float().repeat_interleave(block_size2)[: codes.numel()] + offset.float()


def dequantize_int8_reference(
    codes: Tensor,
    row_scales: Tensor,
    out: Tensor,
    *,
    extension: Extension = NOTHING,
) -> None:
    """Do what `dequantize_int8` does in plain torch."""
    _check_matrix(codes, row_scales, out)
    out[:, : codes.shape[1]] = decode_int8_reference(codes, row_scales).to(out.dtype)
    fill_extension_reference(out[:, codes.shape[1] :], extension, codes.shape[1])


def decode_int8_reference(codes: Tensor, row_scales: Tensor) -> Tensor:
    """Return an int8 weight `[N, K]` in float32."""
    return codes * row_scales.float().view(-1, 1) * ONE_OVER_127


def copy_weight_reference(
    weight: Tensor,
    out: Tensor,
    *,
    extension: Extension = NOTHING,
) -> None:
    """Do what `copy_weight` does in plain torch."""
    _check_matrix(weight, None, out)
    out[:, : weight.shape[1]] = weight
    fill_extension_reference(out[:, weight.shape[1] :], extension, weight.shape[1])


# 1 / 127 as bitsandbytes writes it
ONE_OVER_127 = 7.874015718698502e-3


@jit
def read_vectors(
    weight,
    weight_row_stride,
    tables,
    vectors,
    valid,
    KIND: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return vectors of WIDTH weights as they are stored, `[V, WIDTH]` (4-bit: the codes), and the scale of each."""
    scales, code2, absmax2, offset = tables
    if KIND == "4bit":
        HALF: tl.constexpr = WIDTH // 2
        pairs = tl.load(weight + vectors[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=valid[:, None], other=0)
        pairs = pairs.to(tl.int32)
        # of the two weights in a byte the upper half is the first
        stored = tl.reshape(tl.join(pairs >> 4, pairs & 15), (vectors.shape[0], WIDTH))
        # a block consists of whole vectors, also where it straddles rows
        blocks = vectors // BLOCK_VECTORS
        if NESTED:
            scale = tl.load(code2 + tl.load(scales + blocks, mask=valid, other=0).to(tl.int32)).to(tl.float32)
            scale = scale * tl.load(absmax2 + blocks // BLOCK2, mask=valid, other=0.0).to(tl.float32)
            scale = scale + tl.load(offset).to(tl.float32)
        else:
            scale = tl.load(scales + blocks, mask=valid, other=0.0).to(tl.float32)
    else:
        rows = vectors // ROW_VECTORS
        source = rows.to(tl.int64) * weight_row_stride + vectors % ROW_VECTORS * WIDTH
        stored = tl.load(weight + source[:, None] + tl.arange(0, WIDTH)[None, :], mask=valid[:, None], other=0)
        if KIND == "int8":
            scale = tl.load(scales + rows, mask=valid, other=0.0).to(tl.float32)
        else:
            scale = tl.full((vectors.shape[0],), 1.0, tl.float32)
    return stored, scale


@jit
def decode(stored, scale, code, KIND: tl.constexpr, ONE_OVER_127: tl.constexpr):
    """Return what `read_vectors` read as float32 values; `scale` has the shape of `stored`, or 1 along dimensions."""
    if KIND == "4bit":
        # from shared memory: a little faster than from the first-level cache
        table = tl.load(code + tl.arange(0, 16)).to(tl.float32)
        values = tl.gather(table, tl.reshape(stored, (stored.numel,)), 0)
        return tl.reshape(values, stored.shape) * scale
    values = stored.to(tl.float32) * scale
    if KIND == "int8":
        values = values * ONE_OVER_127
    return values


@jit
def _dequantize_kernel(
    weight,
    weight_row_stride,
    scales,
    code,
    absmax2,
    code2,
    offset,
    out,
    out_row_stride,
    num_rows,
    tail,
    tail_row_stride,
    num_tail,
    up,
    up_row_stride,
    up_column,
    up_rank,
    down,
    down_row_stride,
    down_rank,
    num_columns,
    down_out,
    down_out_row_stride,
    KIND: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK2: tl.constexpr,
    ONE_OVER_127: tl.constexpr,
    VECTORS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    TAIL_COLUMNS: tl.constexpr,
    DOWN_COLUMNS: tl.constexpr,
):
    """Write VECTORS vectors of the flattened weight (KIND "4bit", "int8" or "copy") or, past its end, the pair.

    The programs are in this order: the weight's (KIND "none" has none), the tail columns' tiles, those of `down_out`.
    """
    program = tl.program_id(0)
    dtype = tail.dtype.element_ty
    num_vectors = num_rows * ROW_VECTORS
    weight_programs = (num_vectors + VECTORS - 1) // VECTORS
    if KIND == "none":
        weight_programs = 0
    row_tiles = (num_rows + TAIL_ROWS - 1) // TAIL_ROWS
    tail_programs = row_tiles * ((num_tail + TAIL_COLUMNS - 1) // TAIL_COLUMNS)
    if program < weight_programs:
        vectors = program * VECTORS + tl.arange(0, VECTORS)
        valid = vectors < num_vectors
        rows = vectors // ROW_VECTORS
        columns = vectors % ROW_VECTORS * 8
        tables = (scales, code2, absmax2, offset)
        stored, scale = read_vectors(
            weight, weight_row_stride, tables, vectors, valid, KIND, NESTED, ROW_VECTORS, BLOCK_VECTORS, BLOCK2, 8
        )
        values = decode(stored, scale[:, None], code, KIND, ONE_OVER_127)
        first = rows.to(tl.int64) * out_row_stride + columns
        tl.store(out + first[:, None] + tl.arange(0, 8)[None, :], values.to(dtype), mask=valid[:, None])
    elif program < weight_programs + tail_programs:
        tile = program - weight_programs
        rows = tile % row_tiles * TAIL_ROWS + tl.arange(0, TAIL_ROWS)
        valid_rows = (rows < num_rows)[:, None]
        rows = rows.to(tl.int64)[:, None]
        columns = (tile // row_tiles * TAIL_COLUMNS + tl.arange(0, TAIL_COLUMNS))[None, :]
        if HAS_UP:
            inside = valid_rows & (columns >= up_column) & (columns < up_column + up_rank)
            pair = tl.load(up + rows * up_row_stride + (columns - up_column), mask=inside, other=0.0).to(dtype)
        else:
            pair = tl.full((TAIL_ROWS, TAIL_COLUMNS), 0, dtype)
        tl.store(tail + rows * tail_row_stride + columns, pair, mask=valid_rows & (columns < num_tail))
    else:
        tile = program - weight_programs - tail_programs
        row_programs = (num_columns + DOWN_COLUMNS - 1) // DOWN_COLUMNS
        down_row = (tile // row_programs).to(tl.int64)
        down_columns = tile % row_programs * DOWN_COLUMNS + tl.arange(0, DOWN_COLUMNS)
        inside_row = down_columns < num_columns
        if HAS_DOWN:
            filled = inside_row & (down_row < down_rank)
            line = tl.load(down + down_row * down_row_stride + down_columns, mask=filled, other=0.0).to(dtype)
        else:
            line = tl.full((DOWN_COLUMNS,), 0, dtype)
        tl.store(down_out + down_row * down_out_row_stride + down_columns, line, mask=inside_row)


_TAIL_ROWS = 32
_TAIL_COLUMNS = 64
_DOWN_COLUMNS = 2048


def _launch(
    weight: Tensor,
    scales: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    tail: Tensor,
    in_features: int,
    extension: Extension,
    vectors: int,
    **options: Any,
) -> None:
    """Launch the kernel, a program per block of each output; `out` is passed for pointers that are not read."""
    up, up_column, down, down_out = extension
    num_rows, num_tail = tail.shape
    programs = -(-num_rows // _TAIL_ROWS) * -(-num_tail // _TAIL_COLUMNS)
    if options["KIND"] != "none":
        programs += -(-num_rows * in_features // (8 * vectors))
    if down_out is not None:
        programs += down_out.shape[0] * -(-in_features // _DOWN_COLUMNS)
    _dequantize_kernel[(programs,)](
        weight,
        weight.stride(0),
        scales,
        *tables,
        out,
        out.stride(0),
        num_rows,
        tail,
        tail.stride(0),
        num_tail,
        *((out, 0, 0, 0) if up is None else (up, up.stride(0), up_column, up.shape[1])),
        *((out, 0, 0) if down is None else (down, down.stride(0), down.shape[0])),
        in_features,
        *((out, 0) if down_out is None else (down_out, down_out.stride(0))),
        HAS_UP=up is not None,
        HAS_DOWN=down is not None,
        ROW_VECTORS=max(1, in_features // 8),
        ONE_OVER_127=ONE_OVER_127,
        VECTORS=vectors,
        TAIL_ROWS=_TAIL_ROWS,
        TAIL_COLUMNS=_TAIL_COLUMNS,
        DOWN_COLUMNS=_DOWN_COLUMNS,
        # a fused multiply-add of code2 * absmax2 + offset would round once, bitsandbytes rounds twice
        enable_fp_fusion=False,
        **options,
    )


def dequantize_4bit_triton(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    extension: Extension = NOTHING,
    vectors: int = 512,
    num_warps: int = 4,
) -> None:
    """Do what `dequantize_4bit` does in one Triton launch.

    Args:
        packed, absmax, code, out, block_size, nested, extension: As there.
        vectors: Vectors (of eight weights) per program, a power of two.
        num_warps: Warps per program.
    """
    packed, in_features = _check_4bit(packed, out, block_size)
    extension.check(out[:, in_features:], in_features)
    absmax2, code2, offset, block_size2 = (absmax, code, code, 256) if nested is None else nested
    _launch(
        packed,
        absmax,
        (code, absmax2, code2, offset),
        out,
        out[:, in_features:],
        in_features,
        extension,
        vectors,
        KIND="4bit",
        NESTED=nested is not None,
        BLOCK_VECTORS=block_size // 8,
        BLOCK2=block_size2,
        num_warps=num_warps,
    )


def dequantize_int8_triton(
    codes: Tensor,
    row_scales: Tensor | None,
    out: Tensor,
    *,
    extension: Extension = NOTHING,
    vectors: int = 512,
    num_warps: int = 4,
) -> None:
    """Do what `dequantize_int8` does, or without `row_scales` `copy_weight`, in one Triton launch.

    Args:
        codes, row_scales, out, extension: As there.
        vectors: Vectors (of eight weights) per program, a power of two.
        num_warps: Warps per program.
    """
    _check_matrix(codes, row_scales, out)
    in_features = codes.shape[1]
    extension.check(out[:, in_features:], in_features)
    scales = codes if row_scales is None else row_scales
    _launch(
        codes,
        scales,
        (scales, scales, scales, scales),
        out,
        out[:, in_features:],
        in_features,
        extension,
        vectors,
        KIND="copy" if row_scales is None else "int8",
        NESTED=False,
        BLOCK_VECTORS=1,
        BLOCK2=1,
        num_warps=num_warps,
    )


def fill_extension_triton(tail: Tensor, extension: Extension) -> None:
    """Do what `fill_extension` does in one Triton launch."""
    extension.check(tail)
    down_out = extension.down_out
    if tail.numel() or down_out is not None:
        kind = {"KIND": "none", "NESTED": False, "BLOCK_VECTORS": 1, "BLOCK2": 1}
        in_features = 0 if down_out is None else down_out.shape[1]
        _launch(tail, tail, (tail, tail, tail, tail), tail, tail, in_features, extension, 512, num_warps=4, **kind)


def _check_4bit(packed: Tensor, out: Tensor, block_size: int) -> tuple[Tensor, int]:
    """Return the packed weight as bytes and the weight's number of columns, or raise."""
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    if out.dtype not in _DTYPES or out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(f"out: expected floating rows of unit column stride, got {out.dtype} {tuple(out.shape)}")
    num_rows = out.shape[0]
    in_features = packed.numel() * 2 // num_rows
    if in_features * num_rows != packed.numel() * 2 or in_features % 8 or in_features > out.shape[1]:
        raise ValueError(
            f"packed weight of {packed.numel()} bytes does not fit {num_rows} rows of at most {out.shape[1]} columns "
            "(a multiple of 8)"
        )
    if block_size % 8 or not packed.is_contiguous() or packed.numel() >= 2**30:
        raise ValueError(
            f"expected a contiguous packed weight and whole vectors of 8 in a block, got block size {block_size}"
        )
    return packed, in_features


def _check_matrix(codes: Tensor, row_scales: Tensor | None, out: Tensor) -> None:
    """Raise unless `out` has room for the matrix, and the scales are one per row."""
    if out.dtype not in _DTYPES or out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(f"out: expected floating rows of unit column stride, got {out.dtype} {tuple(out.shape)}")
    num_rows, in_features = codes.shape
    if num_rows != out.shape[0] or in_features > out.shape[1] or in_features % 8 or codes.stride(1) != 1:
        raise ValueError(f"weight {tuple(codes.shape)} does not fit out {tuple(out.shape)} (columns: a multiple of 8)")
    if row_scales is not None and (codes.dtype != torch.int8 or row_scales.numel() != num_rows):
        raise ValueError(f"expected int8 codes and {num_rows} scales, got {codes.dtype} and {row_scales.numel()}")
    if num_rows * in_features >= 2**31:
        raise ValueError(f"weight {tuple(codes.shape)} is too large for 32-bit indices")


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out: Tensor,
    *,
    block_size: int,
    nested: Nested | None = None,
    extension: Extension = NOTHING,
) -> None:
    """Dequantize a 4-bit weight of bitsandbytes into `out`, beside its adapter's pair.

    Args:
        packed: The packed weight, any shape: row-major `[N, K]`, two weights a byte, the first in the upper half.
        absmax: Scale of each quantization block, floating, or uint8 codes of it with `nested`.
        code: The 16 values of the table (NF4, FP4), float32.
        out: `[N, K + R]`, unit column stride; bf16, fp16 or fp32. K is a multiple of 8.
        block_size: Weights per quantization block, a multiple of 8.
        nested: `(absmax2, code2, offset, block_size2)` of a doubly quantized `absmax`; all tensors on the device.
        extension: The pair, and where it goes.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    run = dequantize_4bit_triton if use_triton(out) else dequantize_4bit_reference
    run(packed, absmax, code, out, block_size=block_size, nested=nested, extension=extension)


def dequantize_int8(
    codes: Tensor,
    row_scales: Tensor,
    out: Tensor,
    *,
    extension: Extension = NOTHING,
) -> None:
    """Dequantize an int8 weight with row scales into `out`, beside its adapter's pair.

    Args:
        codes: int8 `[N, K]`, K a multiple of 8.
        row_scales: `[N]`, the largest magnitude of each row.
        out, extension: As in `dequantize_4bit`.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    run = dequantize_int8_triton if use_triton(out) else dequantize_int8_reference
    run(codes, row_scales, out, extension=extension)


def copy_weight(
    weight: Tensor,
    out: Tensor,
    *,
    extension: Extension = NOTHING,
) -> None:
    """Copy an unquantized weight into `out`, beside its adapter's pair.

    Args:
        weight: floating `[N, K]`, K a multiple of 8, unit column stride.
        out, extension: As in `dequantize_4bit`.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if use_triton(out):
        dequantize_int8_triton(weight, None, out, extension=extension)
    else:
        copy_weight_reference(weight, out, extension=extension)


def fill_extension(tail: Tensor, extension: Extension) -> None:
    """Write an adapter's pair alone: `up` into the tail's columns, zeros into its others, and `down_out`.

    Args:
        tail: `[N, R]`, unit column stride: columns beside a weight, or a matrix of its own.
        extension: The pair, and where it goes.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if use_triton(tail):
        fill_extension_triton(tail, extension)
    else:
        fill_extension_reference(tail, extension)
