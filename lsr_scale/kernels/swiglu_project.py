"""SwiGLU and, from the same registers, its product with the down-projection of the adapter behind it.

    h = silu(gate) * up                                                 silu(z) = z sigmoid(z)
    xa = h @ down^T                                                     [T, R]

`gate_up` holds gate in columns [0, F) and up in [F, 2F). h is rounded to the dtype before it is multiplied, as a GEMM
would find it in memory; float32 arithmetic otherwise. A program owns BLOCK_T tokens and one of several ranges of
columns: its partial xa is stored in float32, and a second kernel sums the partials in a fixed order (split K). Bytes
per element of h in a 16-bit dtype: 6, as without the product. Beside that `8 splits` per element of xa, for as many
columns as are not zero, and `T / BLOCK_T` reads of `down`, which come from the L2 cache.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, tl, triton, use_triton
from lsr_scale.kernels.swiglu import swiglu, swiglu_reference


def swiglu_project_reference(
    gate_up: Tensor, out: Tensor, down: Tensor, xa_out: Tensor, *, rank: int | None = None
) -> None:
    """Compute `swiglu_project` in plain torch, in float32 or, for float64 tensors, in float64."""
    features = down.shape[1]
    swiglu_reference(gate_up, out[:, :features])
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    xa_out.copy_(out[:, :features].to(wide) @ down.to(wide).t())
    out[:, features:] = xa_out


@jit
def _swiglu_project_kernel(
    gate_up,
    out,
    down,
    xa_partial,
    num_rows,
    gate_up_row_stride,
    out_row_stride,
    down_row_stride,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    STEPS: tl.constexpr,
    PIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Take BLOCK_T tokens through one range of STEPS blocks of columns."""
    dtype = out.dtype.element_ty
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, BLOCK_F)
    r = tl.arange(0, BLOCK_R)
    valid = tl.program_id(0) * BLOCK_T + rows < num_rows
    # scalars in 64 bits, as tokens times row stride exceeds 2^31 for long batches; offsets inside a tile in 32
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    gate_up += first * gate_up_row_stride + rows * gate_up_row_stride
    out += first * out_row_stride + rows * out_row_stride
    down += r[:, None] * down_row_stride
    acc = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
    for step in range(STEPS):
        f = (split * STEPS + step) * BLOCK_F + columns[None, :]
        inside = f < FEATURES
        mask = valid & inside
        gate = tl.load(gate_up + f, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + FEATURES + f, mask=mask, other=0.0).to(tl.float32)
        down_tile = tl.load(down + f, mask=(r < RANK)[:, None] & inside, other=0.0)
        # masked elements are zero in both operands
        h = (gate * (1.0 / (1.0 + tl.exp(-gate))) * up).to(dtype)
        if PIN:
            # An opaque copy: without it the compiler computes the tile, and loads its inputs, once for the store and
            # once more in the layout that the product wants.
            h = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [h], dtype=dtype, is_pure=False, pack=2)
        tl.store(out + f, h, mask=mask)
        acc = tl.dot(h, tl.trans(down_tile), acc, input_precision="ieee")
    xa_partial += (split.to(tl.int64) * num_rows + first) * BLOCK_R
    tl.store(xa_partial + rows * BLOCK_R + r[None, :], acc, mask=valid)


@jit
def _reduce_partials_kernel(
    xa_partial,
    out,
    xa_out,
    num_rows,
    out_row_stride,
    FEATURES: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK elements of xa over the ranges of columns; columns from BLOCK_R on become zero."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // R
    column = index % R
    valid = row < num_rows
    partials = xa_partial + row * BLOCK_R + column
    stride = tl.full([], BLOCK_R, tl.int64) * num_rows
    total = tl.full([BLOCK], 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + split * stride, mask=valid & (column < BLOCK_R), other=0.0)
    xa = total.to(out.dtype.element_ty)
    tl.store(out + row * out_row_stride + FEATURES + column, xa, mask=valid)
    tl.store(xa_out + index, xa, mask=valid)


def swiglu_project_triton(
    gate_up: Tensor,
    out: Tensor,
    down: Tensor,
    xa_out: Tensor,
    *,
    rank: int | None = None,
    block_t: int = 32,
    block_f: int | None = None,
    splits: int | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Launch the fused kernel and the sum of its partials; the arguments are `swiglu_project`'s, then these.

    `block_t` tokens per program; `block_f` columns per step, by default chosen from the rank; `splits` ranges of
    columns, each with programs of its own; `num_stages` of software pipelining.
    """
    num_rows = gate_up.shape[0]
    R, features = down.shape
    rank = R if rank is None else rank
    _check(gate_up, out, down, xa_out, rank)
    # tensor cores want 16 columns or more, Triton powers of two
    block_r = max(16, triton.next_power_of_2(rank))
    # with a tile of `down` of at most 16 KB, a multiprocessor has room for several programs of three stages
    block_f = block_f or max(32, min(256 // gate_up.dtype.itemsize, 16384 // (block_r * gate_up.dtype.itemsize)))
    tiles, blocks = triton.cdiv(num_rows, block_t), triton.cdiv(features, block_f)
    # enough programs that the last ones to end leave few multiprocessors idle
    steps = triton.cdiv(blocks, splits or max(1, min(16, 1024 // tiles)))
    splits = int(triton.cdiv(blocks, steps))
    xa_partial = torch.empty(splits, num_rows, block_r, dtype=torch.float32, device=gate_up.device)
    _swiglu_project_kernel[(tiles, splits)](
        gate_up,
        out,
        down,
        xa_partial,
        num_rows,
        gate_up.stride(0),
        out.stride(0),
        down.stride(0),
        FEATURES=features,
        RANK=rank,
        STEPS=steps,
        # two 16-bit elements per register; the interpreter has no inline assembly
        PIN=gate_up.is_cuda and gate_up.dtype.itemsize == 2,
        BLOCK_T=block_t,
        BLOCK_F=block_f,
        BLOCK_R=block_r,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block = 512
    _reduce_partials_kernel[(triton.cdiv(num_rows * R, block),)](
        xa_partial,
        out,
        xa_out,
        num_rows,
        out.stride(0),
        FEATURES=features,
        R=R,
        SPLITS=splits,
        BLOCK_R=block_r,
        BLOCK=block,
        num_warps=4,
    )


def _check(gate_up: Tensor, out: Tensor, down: Tensor, xa_out: Tensor, rank: int) -> None:
    """Assert what the kernels assume of shapes, strides and dtypes."""
    num_rows, (R, features) = gate_up.shape[0], down.shape
    assert gate_up.shape == (num_rows, 2 * features), (gate_up.shape, down.shape)
    assert out.shape == (num_rows, features + R), (out.shape, gate_up.shape, down.shape)
    assert xa_out.shape == (num_rows, R), (xa_out.shape, gate_up.shape, down.shape)
    assert R % 16 == 0, f"{R} columns: only multiples of 16"
    assert 0 <= rank <= R, f"rank {rank} of {R} columns"
    assert gate_up.stride(1) == out.stride(1) == down.stride(1) == 1, "the last stride must be 1"
    assert xa_out.is_contiguous()
    assert gate_up.dtype == out.dtype == down.dtype == xa_out.dtype


def swiglu_project(gate_up: Tensor, out: Tensor, down: Tensor, xa_out: Tensor, *, rank: int | None = None) -> None:
    """Write `h = silu(gate) * up` to `out[:, :F]`, and `h @ down^T` to `out[:, F:]` and to `xa_out`.

    The product is of h as rounded to the dtype, summed in float32 and rounded once. Rows of `gate_up`, `out` and `down`
    may have any row stride.

    Args:
        gate_up: `[T, 2F]`, gate in the first F columns.
        out: `[T, F + R]`, in the dtype of `gate_up`; overlaps no other argument.
        down: `[R, F]`, in the dtype of `gate_up`; R is a multiple of 16.
        xa_out: `[T, R]`, contiguous, in the dtype of `gate_up`.
        rank: How many rows of `down` are not zero (only these need be read); all if not given.
    """
    if is_fake(gate_up):
        return
    if not use_triton(gate_up):
        swiglu_project_reference(gate_up, out, down, xa_out, rank=rank)
    elif gate_up.dtype.itemsize == 2 and (down.shape[0] if rank is None else rank) <= 128:
        swiglu_project_triton(gate_up, out, down, xa_out, rank=rank)
    else:
        # float32 has no tensor cores here, and beyond 128 columns the product is no longer hidden behind memory
        _check(gate_up, out, down, xa_out, 0)
        features = down.shape[1]
        swiglu(gate_up, out[:, :features])
        torch.mm(out[:, :features], down.t(), out=xa_out)
        out[:, features:] = xa_out
