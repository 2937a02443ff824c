"""SwiGLU forward and backward, and the backward pass fused with the adapter products that need its results.

    h = silu(gate) * up                                                 silu(z) = z sigmoid(z)
    d gate = dh * up * sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
    d up = dh * silu(gate)

`gate_up` holds gate in columns [0, F) and up in [F, 2F), as one GEMM leaves them. Float32 arithmetic, one rounding.
Bytes per element of h in a 16-bit dtype: forward 6, backward 10 (12 with h).

`swiglu_adapter_backward` also computes, from d gate, d up and h while they are in registers,

    ds = [d gate | d up] @ up_rows                    [T, R]    what the frozen GEMM's K-extension multiplies by `down`
    d gate_pair = d gate^T @ xa[:, gate's columns]    [F, r_gate]       gradient of gate's up-projection
    d up_pair = d up^T @ xa[:, up's columns]          [F, r_up]         gradient of up's up-projection
    d down = ds_down^T @ h                            [r_down, F]       gradient of the down layer's down-projection

so that neither is read from memory again and h is never written: 10 bytes per element instead of 20. A program owns
BLOCK_F columns and walks over a range of tokens: the pair gradients stay in its accumulators, and its share of ds
(float32, `8 (r_gate + r_up) / BLOCK_F` bytes per element, written and read) is summed by a second kernel in a fixed
order. There are no atomics: results do not change from run to run.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, triton, use_triton


def swiglu_reference(gate_up: Tensor, out: Tensor) -> None:
    """Compute `swiglu` in plain torch, in float32 or, for float64 tensors, in float64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    out.copy_(gate * gate.sigmoid() * up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor, out: Tensor, h_out: Tensor | None = None) -> None:
    """Compute `swiglu_backward` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    # copies, as outputs may be the same memory
    gate, up = gate_up.to(wide, copy=True).chunk(2, -1)
    grad, sigmoid = grad.to(wide, copy=True), gate.sigmoid()
    out.copy_(torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), -1))
    if h_out is not None:
        h_out.copy_(gate * sigmoid * up)


def swiglu_adapter_backward_reference(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    up: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    ds_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `swiglu_adapter_backward` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    features = grad.shape[1]
    h = torch.empty_like(grad, memory_format=torch.contiguous_format)
    swiglu_backward_reference(grad, gate_up, out, h)
    ds_out.zero_()
    pairs = []
    for nth, (start, rank) in enumerate((gate_columns, up_columns)):
        rows, columns = slice(nth * features, (nth + 1) * features), slice(start, start + rank)
        found = out[:, rows].to(wide)
        ds_out[:, columns] = (found @ up[rows, columns].to(wide)).to(ds_out.dtype)
        pairs.append(found.T @ xa[:, columns].to(wide))
    return pairs[0], pairs[1], ds_down[:, :down_rank].to(wide).T @ h.to(wide)


@jit
def _swiglu_kernel(gate_up, out, features, gate_up_pitch, out_pitch, BLOCK: tl.constexpr):
    # 64 bits: tokens times pitch exceeds 2^31 for long batches
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < features
    gate_up += row * gate_up_pitch + columns
    gate = tl.load(gate_up, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + features, mask=mask, other=0.0).to(tl.float32)
    h = gate * (1.0 / (1.0 + tl.exp(-gate))) * up
    tl.store(out + row * out_pitch + columns, h.to(out.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    grad,
    gate_up,
    out,
    h_out,
    features,
    grad_pitch,
    gate_up_pitch,
    out_pitch,
    h_pitch,
    HAS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < features
    gate_up += row * gate_up_pitch + columns
    out += row * out_pitch + columns
    dh = tl.load(grad + row * grad_pitch + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + features, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out, d_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + features, (dh * silu).to(out.dtype.element_ty), mask=mask)
    if HAS_H:
        tl.store(h_out + row * h_pitch + columns, (silu * up).to(h_out.dtype.element_ty), mask=mask)


@jit
def _swiglu_adapter_backward_kernel(
    grad,
    gate_up,
    xa,
    up_rows,
    ds_down,
    out,
    ds_partial,
    pair_partial,
    num_rows,
    features,
    gate_start,
    up_start,
    gate_rank,
    up_rank,
    down_rank,
    grad_pitch,
    gate_up_pitch,
    xa_pitch,
    up_pitch,
    ds_down_pitch,
    out_pitch,
    steps,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    PIN: tl.constexpr,
):
    dtype = out.dtype.element_ty
    block = tl.program_id(0)
    split = tl.program_id(1)
    first = block * BLOCK_F
    columns = tl.arange(0, BLOCK_F)
    rows = tl.arange(0, BLOCK_T)
    in_width = first + columns < features
    gate_w = tl.arange(0, GATE)
    up_w = tl.arange(0, UP)
    down_w = tl.arange(0, DOWN)
    # a module's own columns only: the block-diagonal scratch holds unspecified memory beside them
    feature_rows = (first + columns).to(tl.int64)[:, None]
    gate_rows = tl.load(
        up_rows + feature_rows * up_pitch + gate_start + gate_w[None, :],
        mask=in_width[:, None] & (gate_w < gate_rank)[None, :],
        other=0.0,
    )
    up_rows = tl.load(
        up_rows + (features + feature_rows) * up_pitch + up_start + up_w[None, :],
        mask=in_width[:, None] & (up_w < up_rank)[None, :],
        other=0.0,
    )
    gate_pair = tl.full([BLOCK_F, GATE], 0.0, tl.float32)
    up_pair = tl.full([BLOCK_F, UP], 0.0, tl.float32)
    down_pair = tl.full([BLOCK_F, DOWN], 0.0, tl.float32)
    # compiled in (interpreter: NumPy refuses its numbers as a bound of range) or, if 0, given at run time
    for step in range(STEPS if STEPS > 0 else steps):
        row = (split * steps + step) * BLOCK_T
        # scalars in 64 bits, as tokens times pitch exceeds 2^31 for long batches; offsets inside a tile in 32
        wide_row = row.to(tl.int64)
        valid = row + rows < num_rows
        mask = valid[:, None] & in_width[None, :]
        dh = tl.load(
            grad + wide_row * grad_pitch + first + rows[:, None] * grad_pitch + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        tile = gate_up + wide_row * gate_up_pitch + first + rows[:, None] * gate_up_pitch + columns[None, :]
        gate = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(tile + features, mask=mask, other=0.0).to(tl.float32)
        xa_tile = xa + wide_row * xa_pitch + rows[:, None] * xa_pitch
        gate_xa = tl.load(
            xa_tile + gate_start + gate_w[None, :], mask=valid[:, None] & (gate_w < gate_rank)[None, :], other=0.0
        )
        up_xa = tl.load(xa_tile + up_start + up_w[None, :], mask=valid[:, None] & (up_w < up_rank)[None, :], other=0.0)
        down_ds = tl.load(
            ds_down + wide_row * ds_down_pitch + rows[:, None] * ds_down_pitch + down_w[None, :],
            mask=valid[:, None] & (down_w < down_rank)[None, :],
            other=0.0,
        )
        # masked elements are zero in all three tiles, so what follows from them is zero in every product
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        d_gate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
        d_up = (dh * silu).to(dtype)
        h = (silu * up).to(dtype)
        if PIN:
            # Opaque copies: without them the compiler recomputes these tiles, and loads them again, once per layout
            # that a product below wants an operand in, and spills registers. So a tile goes through shared memory.
            d_gate = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [d_gate], dtype=dtype, is_pure=False, pack=2)
            d_up = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [d_up], dtype=dtype, is_pure=False, pack=2)
            h = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [h], dtype=dtype, is_pure=False, pack=2)
        tile = out + wide_row * out_pitch + first + rows[:, None] * out_pitch + columns[None, :]
        tl.store(tile, d_gate, mask=mask)
        tl.store(tile + features, d_up, mask=mask)
        gate_ds = tl.dot(d_gate, gate_rows, input_precision="ieee")
        up_ds = tl.dot(d_up, up_rows, input_precision="ieee")
        gate_pair = tl.dot(tl.trans(d_gate), gate_xa, gate_pair, input_precision="ieee")
        up_pair = tl.dot(tl.trans(d_up), up_xa, up_pair, input_precision="ieee")
        down_pair = tl.dot(tl.trans(h), down_ds, down_pair, input_precision="ieee")
        partial = ds_partial + (block.to(tl.int64) * num_rows + row + rows)[:, None] * (GATE + UP)
        tl.store(partial + gate_w[None, :], gate_ds, mask=valid[:, None])
        tl.store(partial + GATE + up_w[None, :], up_ds, mask=valid[:, None])
    pair_partial += split.to(tl.int64) * features * (gate_rank + up_rank + down_rank)
    tl.store(
        pair_partial + feature_rows * gate_rank + gate_w[None, :],
        gate_pair,
        mask=in_width[:, None] & (gate_w < gate_rank)[None, :],
    )
    pair_partial += features * gate_rank
    tl.store(
        pair_partial + feature_rows * up_rank + up_w[None, :],
        up_pair,
        mask=in_width[:, None] & (up_w < up_rank)[None, :],
    )
    pair_partial += features * up_rank
    tl.store(
        pair_partial + feature_rows + down_w[None, :] * features,
        down_pair,
        mask=in_width[:, None] & (down_w < down_rank)[None, :],
    )


@jit
def _sum_ds_kernel(
    ds_partial,
    ds_out,
    num_rows,
    num_columns,
    gate_start,
    up_start,
    gate_rank,
    up_rank,
    ds_pitch,
    NUM_BLOCKS: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits for the partials only; tokens times ranks stay below 2^31
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = index // num_columns
    column = index % num_columns
    in_gate = (column >= gate_start) & (column < gate_start + gate_rank)
    in_up = (column >= up_start) & (column < up_start + up_rank)
    source = row * (GATE + UP) + tl.where(in_gate, column - gate_start, GATE + column - up_start)
    mask = (row < num_rows) & (in_gate | in_up)
    stride = tl.full([], GATE + UP, tl.int64) * num_rows
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, NUM_BLOCKS, 8):
        # eight loads in flight
        for nth in tl.static_range(8):
            inside = mask & (start + nth < NUM_BLOCKS)
            total += tl.load(ds_partial + (start + nth) * stride + source, mask=inside, other=0.0)
    # columns of no module become zero
    tl.store(ds_out + row.to(tl.int64) * ds_pitch + column, total.to(ds_out.dtype.element_ty), mask=row < num_rows)


def _pitch(x: Tensor) -> int:
    assert x.stride(1) == 1, f"strides {x.stride()}: the last must be 1"
    return x.stride(0)


def swiglu_triton(gate_up: Tensor, out: Tensor, *, block: int = 1024, num_warps: int = 4) -> None:
    """Launch the forward kernel; the arguments are `swiglu`'s, then a program's columns and warps."""
    rows, features = out.shape
    assert gate_up.shape == (rows, 2 * features)
    _swiglu_kernel[(rows, triton.cdiv(features, block))](
        gate_up, out, features, _pitch(gate_up), _pitch(out), BLOCK=block, num_warps=num_warps
    )


def swiglu_backward_triton(
    grad: Tensor,
    gate_up: Tensor,
    out: Tensor,
    h_out: Tensor | None = None,
    *,
    block: int = 1024,
    num_warps: int = 4,
) -> None:
    """Launch the backward kernel; the arguments are `swiglu_backward`'s, then a program's columns and warps."""
    rows, features = grad.shape
    assert gate_up.shape == out.shape == (rows, 2 * features)
    assert h_out is None or h_out.shape == grad.shape
    _swiglu_backward_kernel[(rows, triton.cdiv(features, block))](
        grad,
        gate_up,
        out,
        grad if h_out is None else h_out,
        features,
        _pitch(grad),
        _pitch(gate_up),
        _pitch(out),
        _pitch(grad if h_out is None else h_out),
        HAS_H=h_out is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def _accumulator_width(rank: int) -> int:
    """Return the columns of a product's accumulator: Triton wants powers of two, tensor cores 16 or more."""
    return max(16, triton.next_power_of_2(rank))


# By the sum of the accumulators' widths: columns of h and warps per program.
_ADAPTER_BLOCKS = {48: (128, 4), 96: (128, 16), 192: (64, 8)}


def swiglu_adapter_backward_triton(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    up: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    ds_out: Tensor,
    *,
    block_t: int = 32,
    block_f: int | None = None,
    num_warps: int = 8,
    num_stages: int = 2,
    num_programs: int = 792,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the fused kernel and the sum of its shares; the arguments are `swiglu_adapter_backward`'s, then these.

    `block_t` tokens per step of a program; `block_f` columns of h per program, by default chosen, with the warps, from
    the ranks (`num_warps` counts only if it is given); `num_stages` of software pipelining; and at most about
    `num_programs` programs: a multiple of the GPU's multiprocessors leaves few of them idle at the end.
    """
    rows, features = grad.shape
    (gate_start, gate_rank), (up_start, up_rank) = gate_columns, up_columns
    assert gate_up.shape == out.shape == (rows, 2 * features)
    assert up.shape[0] == 2 * features
    assert xa.shape[0] == ds_down.shape[0] == ds_out.shape[0] == rows
    assert max(gate_start + gate_rank, up_start + up_rank) <= min(xa.shape[1], up.shape[1], ds_out.shape[1])
    assert gate_start + gate_rank <= up_start or up_start + up_rank <= gate_start, "columns overlap"
    assert down_rank <= ds_down.shape[1]
    assert max(gate_rank, up_rank, down_rank) <= 64, "ranks above 64 want accumulators that no program has room for"
    widths = tuple(_accumulator_width(rank) for rank in (gate_rank, up_rank, down_rank))
    if block_f is None:
        # so that the accumulators, `sum(widths) * block_f` in float32, leave registers for the tiles
        block_f, num_warps = _ADAPTER_BLOCKS[min(key for key in _ADAPTER_BLOCKS if key >= sum(widths))]
        if grad.dtype.itemsize == 4:
            # twice the shared memory, and products without tensor cores
            block_f, num_warps = 64, 4
    blocks = triton.cdiv(features, block_f)
    tiles = triton.cdiv(rows, block_t)
    steps = triton.cdiv(tiles, max(1, num_programs // blocks))
    splits = triton.cdiv(tiles, steps)
    ds_partial = torch.empty((blocks, rows, widths[0] + widths[1]), dtype=torch.float32, device=grad.device)
    sizes = [features * rank for rank in (gate_rank, up_rank, down_rank)]
    pair_partial = torch.empty((splits, sum(sizes)), dtype=torch.float32, device=grad.device)
    _swiglu_adapter_backward_kernel[(blocks, splits)](
        grad,
        gate_up,
        xa,
        up,
        ds_down,
        out,
        ds_partial,
        pair_partial,
        rows,
        features,
        gate_start,
        up_start,
        gate_rank,
        up_rank,
        down_rank,
        _pitch(grad),
        _pitch(gate_up),
        _pitch(xa),
        _pitch(up),
        _pitch(ds_down),
        _pitch(out),
        steps,
        STEPS=0 if grad.is_cuda else steps,
        BLOCK_T=block_t,
        BLOCK_F=block_f,
        GATE=widths[0],
        UP=widths[1],
        DOWN=widths[2],
        # two 16-bit elements per register; the interpreter knows no assembly
        PIN=grad.is_cuda and grad.dtype.itemsize == 2,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block = 256
    _sum_ds_kernel[(triton.cdiv(rows * ds_out.shape[1], block),)](
        ds_partial,
        ds_out,
        rows,
        ds_out.shape[1],
        gate_start,
        up_start,
        gate_rank,
        up_rank,
        _pitch(ds_out),
        NUM_BLOCKS=blocks,
        GATE=widths[0],
        UP=widths[1],
        BLOCK=block,
        num_warps=4,
    )
    gate_pair, up_pair, down = (pair_partial[0] if splits == 1 else pair_partial.sum(0)).split(sizes)
    return gate_pair.view(features, gate_rank), up_pair.view(features, up_rank), down.view(down_rank, features)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Write `silu(gate) * up` to `out`.

    Args:
        gate_up: `[T, 2F]`, gate in the first F columns; rows may have any pitch.
        out: `[T, F]`, rows of any pitch; may be gate's or up's half of `gate_up`, else must not overlap it.
    """
    run = swiglu_triton if use_triton(gate_up) else swiglu_reference
    run(gate_up, out)


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor, h_out: Tensor | None = None) -> None:
    """Write the gradients of gate and up to `out`, and h again if asked.

    Args:
        grad: Gradient of h, `[T, F]`; rows of all tensors may have any pitch.
        gate_up: `[T, 2F]`, what `swiglu` was given.
        out: `[T, 2F]`: the gradient of gate in the first F columns, of up in the rest; may be `gate_up` itself.
        h_out: Where h goes, `[T, F]`; may be `grad` itself.
    """
    run = swiglu_backward_triton if use_triton(gate_up) else swiglu_backward_reference
    run(grad, gate_up, out, h_out)


def swiglu_adapter_backward(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    up: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    ds_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `swiglu_backward` and every adapter product of its results, which are rounded to the dtype first.

    Rows of all tensors may have any pitch. A rank of 0 leaves a module out.

    Args:
        grad: Gradient of h, `[T, F]`.
        gate_up: `[T, 2F]`, what `swiglu` was given.
        xa: `[T, R]`: the input of gate and up times their down-projections, in the columns named below.
        up: `[2F, R]`: gate's up-projection in rows 0..F of its columns, up's in the other rows of its own; nothing
            else of it is read.
        gate_columns: First column and rank of gate's pair.
        up_columns: First column and rank of up's pair; the two do not overlap.
        ds_down: `[T, >= down_rank]`: gradient of the down layer's output times its up-projection.
        down_rank: How many columns of `ds_down` count.
        out: Where the gradients of gate and up go, `[T, 2F]`; may be `gate_up` itself.
        ds_out: Where `[d gate | d up] @ up` goes, `[T, R]`; columns of neither module become zero. May be the columns
            right behind `out` in the same buffer.

    Returns:
        `(d gate_pair [F, r_gate], d up_pair [F, r_up], d down [down_rank, F])`, contiguous and in float32 (float64 for
        float64 inputs).
    """
    run = swiglu_adapter_backward_triton if use_triton(gate_up) else swiglu_adapter_backward_reference
    return run(grad, gate_up, xa, up, gate_columns, up_columns, ds_down, down_rank, out, ds_out)
