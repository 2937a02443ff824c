"""A GEMM of 8-bit codes whose last step, in bfloat16, is an adapter's product: the base in 8 bits, what is trained not.

    out = (A B^T) * scales[:, None] * weight_scale + thin up^T + bias            A [T, K], B [N, K] e4m3 or int8 codes

Codes are summed on tensor cores, e4m3 in float32, int8 exactly in int32; then each row is scaled, and the thin product
[T, R] x [R, N] is added to the same accumulators from its bfloat16 operands before the only rounding. So an adapter
costs its R / K of the operations and no memory traffic, and its precision is that of a product of its own. Hopper's FP8
accumulators keep about 14 bits of a sum: far below what rounding to e4m3 (4 bits) costs.

A program stays on its multiprocessor and takes one tile of the output after another (a persistent grid); as the loops
over tiles and over K are one, the next tile's operands arrive while a tile is written. Operands come as tensor
descriptors: by the tensor memory accelerator on Hopper and later, by pointers elsewhere. Both have K contiguous, as
Hopper's FP8 tensor cores want it, so an input gradient takes the transposed codes of the weight as B.
"""

# pyright: reportInvalidTypeForm=false

from typing import Any

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, multiprocessors, shared_memory, tl, triton, use_triton
from lsr_scale.kernels.fp8 import E4M3


def gemm_8bit_reference(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    *,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Compute `gemm_8bit` in plain torch: e4m3 codes are summed in float32, int8 codes exactly."""
    wide = torch.float64 if codes.dtype == torch.int8 else torch.float32
    result = (codes.to(wide) @ weight.to(wide).t()).float() * scales[:, None] * weight_scale
    if thin is not None:
        result += thin.float() @ (up.float().t() if up is not None else down.float())  # pyright: ignore
    out.copy_(result if bias is None else result + bias.float())


@jit
def _gemm_8bit_kernel(
    a,
    b,
    scales,
    weight_scale,
    thin,
    other,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_INT8: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    OTHER_IS_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Take every `num_programs`-th tile of the output; GROUP tiles of rows share columns in the L2 cache."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    group_tiles = GROUP * column_tiles
    # constexprs or, if 0, values: in the interpreter, which has one program, NumPy's numbers are no bound of range
    for tile in tl.range(
        0 if TILES else tl.program_id(0),
        TILES if TILES else row_tiles * column_tiles,
        1 if TILES else tl.num_programs(0),
        flatten=True,
    ):
        first = tile // group_tiles * GROUP
        rows_in_group = min(row_tiles - first, GROUP)
        row = (first + tile % group_tiles % rows_in_group) * BLOCK_M
        column = tile % group_tiles // rows_in_group * BLOCK_N
        total = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32 if IS_INT8 else tl.float32)
        for k in range(0, DEPTH if DEPTH else depth, BLOCK_K):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total, out_dtype=total.dtype)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        acc = total.to(tl.float32) * tl.load(scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        if COLUMN_SCALES:
            acc *= tl.load(weight_scale + columns, mask=columns < num_columns, other=0.0)[None, :]
        else:
            acc *= tl.load(weight_scale)
        if R:
            # no static_range: what the loop over tiles would prefetch of each step does not fit beside the codes
            for r in tl.range(0, R, BLOCK_R, num_stages=1):
                if OTHER_IS_UP:
                    acc = tl.dot(thin.load([row, r]), other.load([column, r]).T, acc)
                else:
                    acc = tl.dot(thin.load([row, r]), other.load([r, column]), acc)
        if HAS_BIAS:
            acc += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        if PARTS == 2:
            # half of the tile at a time needs half of the shared memory
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([row, column], left.to(out.dtype))
            out.store([row, column + BLOCK_N // 2], right.to(out.dtype))
        else:
            out.store([row, column], acc.to(out.dtype))


def gemm_8bit_triton(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    *,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    bias: Tensor | None = None,
    block_m: int = 128,
    block_n: int | None = None,
    block_k: int | None = None,
    group: int = 8,
    num_warps: int = 8,
    num_stages: int = 3,
) -> None:
    """Launch the kernel; the arguments are `gemm_8bit`'s, then these.

    `block_m`, `block_n`, `block_k`: a tile of the output and the depth of a step, by default what the GPU's shared
    memory has room for; `group` tiles of rows that are computed together; `num_stages` of software pipelining.
    """
    _check(codes, scales, weight, weight_scale, out, thin, up, down, bias)
    (num_rows, depth), num_columns = codes.shape, len(weight)
    large = shared_memory(codes) >= 200 * 1024
    block_n = block_n or (256 if large else 128)
    block_k = block_k or (128 if large else 64)
    R = 0 if thin is None else thin.shape[1]
    block_r = min(R, 64 if R % 64 == 0 else 32 if R % 32 == 0 else 16)
    other = up if up is not None else down
    tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(num_columns, block_n)
    parts = 2 if block_n >= 256 else 1
    # what is not read gets any descriptor of fitting alignment
    operands = (
        (codes, [block_m, block_k]),
        (weight, [block_n, block_k]),
        (codes, [block_m, block_k]) if thin is None else (thin, [block_m, block_r]),
        (codes, [block_m, block_k])
        if other is None
        else (other, [block_n, block_r] if up is not None else [block_r, block_n]),
        (out, [block_m, block_n // parts]),
    )
    a, b, thin_operand, other_operand, target = (_descriptor(x, block) for x, block in operands)
    _gemm_8bit_kernel[(min(tiles, multiprocessors(codes)),)](
        a,
        b,
        scales,
        weight_scale,
        thin_operand,
        other_operand,
        scales if bias is None else bias,
        target,
        num_rows,
        num_columns,
        depth,
        R=R,
        HAS_BIAS=bias is not None,
        IS_INT8=codes.dtype == torch.int8,
        COLUMN_SCALES=weight_scale.numel() > 1,
        OTHER_IS_UP=up is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=max(16, block_r),
        GROUP=group,
        PARTS=parts,
        TILES=0 if codes.is_cuda else tiles,
        DEPTH=0 if codes.is_cuda else depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _descriptor(x: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

    return TensorDescriptor.from_tensor(x, block)


def _check(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    thin: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes, strides and addresses fit each other and tensor descriptors."""
    (T, K), N = codes.shape, len(weight)
    if weight.shape[1] != K or out.shape != (T, N) or scales.shape != (T,) or weight_scale.shape not in ((1,), (N,)):
        raise ValueError(
            f"shapes do not fit: codes {tuple(codes.shape)}, scales {tuple(scales.shape)}, "
            f"weight {tuple(weight.shape)}, weight_scale {tuple(weight_scale.shape)}, out {tuple(out.shape)}"
        )
    dtypes = codes.dtype, weight.dtype, scales.dtype, weight_scale.dtype
    if dtypes[0] not in (E4M3, torch.int8) or dtypes[1:] != (dtypes[0], torch.float32, torch.float32):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"expected codes both in e4m3 or both in int8, and float32 scales; got {names}")
    if (thin is None) != (up is None and down is None) or (up is not None and down is not None):
        raise ValueError("thin: given exactly if one of up and down is")
    if thin is not None:
        R = thin.shape[1]
        other = tuple(up.shape) if up is not None else tuple(down.t().shape)  # pyright: ignore
        if len(thin) != T or other != (N, R) or R % 16:
            raise ValueError(
                f"thin {tuple(thin.shape)}, up or down {other}: expected {(T, R)} and {(N, R)}, R % 16 == 0"
            )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias {tuple(bias.shape)}: expected {(N,)}")
    for x in (codes, weight, out, thin, up, down):
        if x is not None and (x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16):
            raise ValueError(
                f"{tuple(x.shape)} {x.dtype}, strides {x.stride()}: expected a unit column stride, and rows at "
                "multiples of 16 bytes"
            )


def gemm_8bit(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    *,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write `(codes weight^T) scales weight_scale + thin up^T + bias` to `out`, rounded once.

    e4m3 codes are summed in float32, int8 codes exactly, all else in float32. All matrices have a unit column stride
    and rows that begin at multiples of 16 bytes.

    Args:
        codes: e4m3 or int8 `[T, K]`.
        scales: float32 `[T]`, what each row of codes is multiplied by.
        weight: `[N, K]` in the dtype of the codes.
        weight_scale: float32, what the weight's codes are multiplied by: `[1]`, or `[N]`, one for each row.
        out: `[T, N]` bfloat16; overlaps no other argument.
        thin: `[T, R]` bfloat16, an adapter's side of the product that is added, R a multiple of 16.
        up: `[N, R]` bfloat16, the other side; or `down`.
        down: `[R, N]` bfloat16, the other side transposed.
        bias: `[N]`, added to every row.

    Raises:
        ValueError: if shapes, dtypes, strides or addresses do not fit.
    """
    if is_fake(codes):
        return
    run = gemm_8bit_triton if use_triton(codes, torch.bfloat16) else gemm_8bit_reference
    run(codes, scales, weight, weight_scale, out, thin=thin, up=up, down=down, bias=bias)
