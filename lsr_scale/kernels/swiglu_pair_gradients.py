"""The backward pass of SwiGLU fused with the adapter products that need its results.

    d gate, d up, h                                                     as in `swiglu.py`
    d gate_pair = d gate^T @ xa[:, gate's columns]    [F, r_gate]       gradient of gate's up-projection
    d up_pair = d up^T @ xa[:, up's columns]          [F, r_up]         gradient of up's up-projection
    d down = ds_down^T @ h                            [r_down, F]       gradient of the down layer's down-projection

The products are taken from d gate, d up and h while they are in registers, so that neither gradient is read from memory
again and h is never written: 10 bytes per element of h in a 16-bit dtype instead of 18. A program owns a block of
columns and loops over a range of tokens with the products in its accumulators; the ranges' partial results are summed
in a fixed order. There are no atomics: results do not change from run to run.

In 16-bit dtypes its loop has neither shared memory nor barriers. A tensor-core instruction wants each thread to hold
four tokens of a column, where a wide memory access gives it neighbouring columns of a token. Yet the order in which
tokens are summed and in which columns stand in the product is free: a tile is loaded as `[4 (lanes), 8 (lanes), warps,
tokens of a thread, columns of a thread]`, the order in which the compiler assigns elements to lanes and warps, and is
reshaped (which moves nothing) to the `[tokens, columns]` that a thread's registers already are. So that no warp needs
another's data, the products are batched: a batch is a warp. (Should a compiler assign elements otherwise, results stay
right and the loop gets slower.)
"""

# pyright: reportInvalidTypeForm=false

import math

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, tl, triton, use_triton
from lsr_scale.kernels.swiglu import row_stride, swiglu_backward_reference


def swiglu_pair_gradients_reference(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    trials: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `swiglu_pair_gradients` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    h = torch.empty_like(grad, memory_format=torch.contiguous_format)
    swiglu_backward_reference(grad, gate_up, out, h)
    split = lambda x: x.to(wide).unflatten(0, (trials or 1, -1))  # noqa: E731
    thin = split(xa)
    pairs = []
    for gradient, (start, rank) in zip(split(out).chunk(2, -1), (gate_columns, up_columns), strict=True):
        pairs.append(gradient.mT @ thin[..., start : start + rank])
    pairs.append(split(ds_down[:, :down_rank]).mT @ split(h))
    gate_pair, up_pair, down = (pair if trials else pair[0] for pair in pairs)
    return gate_pair, up_pair, down


@jit
def _load_rank_operand(
    base,
    width,
    token,
    limit,
    row_stride,
    UNMASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Load `[BLOCK_T, WIDTH]` as a product's left operand `[WARPS, WIDTH, BLOCK_T]`, the same for each warp."""
    PER_THREAD: tl.constexpr = WIDTH // 8
    rank = PER_THREAD * tl.arange(0, 8)[None, :, None, None, None]
    rank += tl.arange(0, PER_THREAD)[None, None, None, None, :]
    # zeros give the offsets their full shape, warps included
    offsets = token * row_stride + rank + tl.zeros([4, 8, WARPS, BLOCK_T // 4, PER_THREAD], tl.int32)
    # other modules' columns fill rows of the product that are not stored, if memory has them: no mask, wide loads
    mask = token < limit
    if not UNMASKED:
        mask = mask & (rank < width)
    x = tl.load(base + offsets, mask=mask, other=0.0)
    x = tl.reshape(x, [4, 8, WARPS, BLOCK_T // 8, 2, PER_THREAD])
    return tl.reshape(tl.permute(x, [2, 5, 1, 3, 0, 4]), [WARPS, WIDTH, BLOCK_T])


@jit
def _as_column_operand(tile, BLOCK_T: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr):
    """Reshape a tile to a product's right operand `[WARPS, BLOCK_T, 8 * VECTOR]`: no data moves."""
    x = tl.reshape(tile, [4, 8, WARPS, BLOCK_T // 8, 2, VECTOR])
    return tl.reshape(tl.permute(x, [2, 3, 0, 4, 5, 1]), [WARPS, BLOCK_T, 8 * VECTOR])


@jit
def _by_column(pair, WIDTH: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr):
    """Return a product as `[columns, WIDTH]`, both in their order in memory."""
    x = tl.permute(tl.reshape(pair, [WARPS, WIDTH // 8, 8, VECTOR, 8]), [0, 4, 3, 2, 1])
    return tl.reshape(x, [WARPS * 8 * VECTOR, WIDTH])


@jit
def _swiglu_pair_gradients_kernel(
    grad,
    gate_up,
    xa,
    ds_down,
    out,
    pair_partial,
    num_rows,
    features,
    gate_start,
    up_start,
    gate_rank,
    up_rank,
    down_rank,
    grad_row_stride,
    gate_up_row_stride,
    xa_row_stride,
    ds_down_row_stride,
    out_row_stride,
    steps,
    splits,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VECTOR: tl.constexpr,
    WARPS: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    BLOCK_F: tl.constexpr = 8 * VECTOR * WARPS
    dtype = out.dtype.element_ty
    first = tl.program_id(0) * BLOCK_F
    split = tl.program_id(1)
    # [4, 8, WARPS, BLOCK_T // 4, VECTOR]; the order of tokens is the instruction's, so that xa needs no shuffle either
    quad = tl.arange(0, 4)[:, None, None, None, None]
    nth = tl.arange(0, BLOCK_T // 4)[None, None, None, :, None]
    inside = 2 * quad + nth // 2 * 8 + nth % 2
    group = VECTOR * tl.arange(0, 8)[None, :, None, None, None]
    group += 8 * VECTOR * tl.arange(0, WARPS)[None, None, :, None, None]
    columns = group + tl.arange(0, VECTOR)[None, None, None, None, :]
    # F is a multiple of 8, so a thread's columns are all in or all out
    in_width = first + group < features
    gate_pair = tl.full([WARPS, GATE, 8 * VECTOR], 0.0, tl.float32)
    up_pair = tl.full([WARPS, UP, 8 * VECTOR], 0.0, tl.float32)
    down_pair = tl.full([WARPS, DOWN, 8 * VECTOR], 0.0, tl.float32)
    # 64 bits where a program starts, as tokens times row stride exceeds 2^31 for long batches; 32 inside its range
    # within the trial's rows, of which there are num_rows
    row = split % splits * steps * BLOCK_T
    limit = num_rows - row
    wide_row = (split // splits).to(tl.int64) * num_rows + row
    grad += wide_row * grad_row_stride + first
    gate_up += wide_row * gate_up_row_stride + first
    out += wide_row * out_row_stride + first
    gate_xa = xa + wide_row * xa_row_stride + UNIT * gate_start
    up_xa = xa + wide_row * xa_row_stride + UNIT * up_start
    ds_down += wide_row * ds_down_row_stride
    # a constexpr (in the interpreter: NumPy's numbers are no bound of range) or, if 0, an argument
    for step in range(STEPS if STEPS > 0 else steps):
        token = step * BLOCK_T + inside
        mask = (token < limit) & in_width
        dh = tl.load(grad + token * grad_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tile = gate_up + token * gate_up_row_stride + columns
        gate = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(tile + features, mask=mask, other=0.0).to(tl.float32)
        gate_left = _load_rank_operand(gate_xa, gate_rank, token, limit, xa_row_stride, UNMASKED, GATE, BLOCK_T, WARPS)
        up_left = _load_rank_operand(up_xa, up_rank, token, limit, xa_row_stride, UNMASKED, UP, BLOCK_T, WARPS)
        down_left = _load_rank_operand(
            ds_down, down_rank, token, limit, ds_down_row_stride, UNMASKED, DOWN, BLOCK_T, WARPS
        )
        # masked elements are zero in all three tiles, so what follows from them is zero in every product
        if INLINE_ASM:
            # the same instructions without their cases for subnormal numbers, which were a fifth of the loop
            sigmoid = tl.inline_asm_elementwise(
                "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
                " add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
                "=r,r",
                [gate],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        d_gate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
        d_up = (dh * silu).to(dtype)
        h = (silu * up).to(dtype)
        tile = out + token * out_row_stride + columns
        tl.store(tile, d_gate, mask=mask)
        tl.store(tile + features, d_up, mask=mask)
        right = _as_column_operand(d_gate, BLOCK_T, VECTOR, WARPS)
        gate_pair = tl.dot(gate_left, right, gate_pair, input_precision="ieee")
        right = _as_column_operand(d_up, BLOCK_T, VECTOR, WARPS)
        up_pair = tl.dot(up_left, right, up_pair, input_precision="ieee")
        right = _as_column_operand(h, BLOCK_T, VECTOR, WARPS)
        down_pair = tl.dot(down_left, right, down_pair, input_precision="ieee")
    pair_partial += split.to(tl.int64) * features * (gate_rank + up_rank + down_rank)
    column = first + tl.arange(0, BLOCK_F)
    gate_w = tl.arange(0, GATE)
    up_w = tl.arange(0, UP)
    down_w = tl.arange(0, DOWN)
    in_width = column < features
    tl.store(
        pair_partial + column[:, None] * gate_rank + gate_w[None, :],
        _by_column(gate_pair, GATE, VECTOR, WARPS),
        mask=in_width[:, None] & (gate_w < gate_rank)[None, :],
    )
    pair_partial += features * gate_rank
    tl.store(
        pair_partial + column[:, None] * up_rank + up_w[None, :],
        _by_column(up_pair, UP, VECTOR, WARPS),
        mask=in_width[:, None] & (up_w < up_rank)[None, :],
    )
    pair_partial += features * up_rank
    tl.store(
        pair_partial + down_w[:, None] * features + column[None, :],
        tl.trans(_by_column(down_pair, DOWN, VECTOR, WARPS)),
        mask=(down_w < down_rank)[:, None] & in_width[None, :],
    )


def _accumulator_width(rank: int) -> int:
    """Return the columns of a product's accumulator: Triton wants powers of two, tensor cores 16 or more."""
    return max(16, triton.next_power_of_2(rank))


# By the sum of the accumulators' widths: columns per thread, warps per program, most registers per thread. A thread's
# accumulators are `sum(widths) * columns / 4` registers; at 168 registers 12 warps share a multiprocessor. For ranks of
# 16 on an H200 that was faster than 128 registers and 16 warps, with some spills: 0.351 ms against 0.374.
_PAIR_BLOCKS = {48: (4, 4, 168), 96: (4, 4, 168), 192: (2, 4, 168)}


def _token_ranges(blocks: int, num_programs: int, cost: float) -> int:
    """Return in how many ranges to split the tokens so that programs run in one to three rounds, the last almost full.

    Args:
        blocks: Programs per range.
        num_programs: Programs that run at once.
        cost: What a range's partial results cost, as a share of all time.
    """
    ranges = [max(1, rounds * num_programs // blocks) for rounds in (1, 2, 3)]
    return max(ranges, key=lambda n: n * blocks / (-(-n * blocks // num_programs) * num_programs) - cost * n)


def swiglu_pair_gradients_triton(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    trials: int | None = None,
    *,
    block_t: int = 16,
    vector: int | None = None,
    num_warps: int = 4,
    max_registers: int | None = 128,
    num_stages: int = 1,
    num_programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the fused kernel and sum its partial results; the arguments are `swiglu_pair_gradients`'s, then these.

    `block_t` tokens per step of a program, 16 or more; `vector` neighbouring columns per thread (2, 4 or 8; a program
    has `8 * vector * num_warps`), by default chosen, with the warps and their most registers, from the ranks (both
    count only if it is given); `num_stages` of software pipelining, above 1 through shared memory; `num_programs` that
    run at once, by default what the registers of a large GPU's 132 multiprocessors hold.
    """
    rows, features = grad.shape
    (gate_start, gate_rank), (up_start, up_rank) = gate_columns, up_columns
    assert gate_up.shape == out.shape == (rows, 2 * features)
    assert features % 8 == 0, f"{features} columns: not a multiple of 8"
    assert xa.shape[0] == ds_down.shape[0] == rows
    assert max(gate_start + gate_rank, up_start + up_rank) <= xa.shape[1]
    assert down_rank <= ds_down.shape[1]
    n = trials or 1
    assert rows % n == 0, f"{rows} rows of {n} trials"
    assert max(gate_rank, up_rank, down_rank) <= 64, "ranks above 64 want accumulators that no program has room for"
    widths = tuple(_accumulator_width(rank) for rank in (gate_rank, up_rank, down_rank))
    if vector is None:
        vector, num_warps, max_registers = _PAIR_BLOCKS[min(key for key in _PAIR_BLOCKS if key >= sum(widths))]
        if grad.dtype.itemsize == 4:
            # products without tensor cores, whose operands go through shared memory
            vector, num_warps, max_registers = 2, 4, None
    if num_programs is None:
        num_programs = 132 * max(1, 65536 // (32 * num_warps * (max_registers or 255)))
    row_strides = [row_stride(x) for x in (grad, gate_up, xa, ds_down, out)]
    blocks = triton.cdiv(features, 8 * vector * num_warps)
    tiles = triton.cdiv(rows // n, block_t)
    # partial results are written and read in float32, to ten bytes per element of h in a 16-bit dtype
    cost = 0.8 * (gate_rank + up_rank + down_rank) * n / max(1, rows)
    steps = triton.cdiv(tiles, min(tiles, _token_ranges(blocks * n, num_programs, cost)))
    # a program's offsets fit in 32 bits
    steps = min(steps, max(1, 2**30 // (block_t * max(row_strides))))
    splits = triton.cdiv(tiles, steps)
    sizes = [features * rank for rank in (gate_rank, up_rank, down_rank)]
    pair_partial = torch.empty((n, splits, sum(sizes)), dtype=torch.float32, device=grad.device)
    # what divides both starts, so that the compiler sees that loads are aligned
    unit = math.gcd(8, gate_start, up_start)
    _swiglu_pair_gradients_kernel[(blocks, n * splits)](
        grad,
        gate_up,
        xa,
        ds_down,
        out,
        pair_partial,
        rows // n,
        features,
        gate_start // unit,
        up_start // unit,
        gate_rank,
        up_rank,
        down_rank,
        *row_strides,
        steps,
        splits,
        STEPS=0 if grad.is_cuda else steps,
        UNIT=unit,
        UNMASKED=max(gate_start + widths[0], up_start + widths[1]) <= xa.shape[1] and widths[2] <= ds_down.shape[1],
        BLOCK_T=block_t,
        VECTOR=vector,
        WARPS=num_warps,
        GATE=widths[0],
        UP=widths[1],
        DOWN=widths[2],
        # the interpreter has no inline assembly
        INLINE_ASM=grad.is_cuda,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=max_registers,
    )
    sums = pair_partial[:, 0] if splits == 1 else pair_partial.sum(1)
    shapes = (features, gate_rank), (features, up_rank), (down_rank, features)
    pairs = [part.view(n, *shape) for part, shape in zip(sums.split(sizes, 1), shapes, strict=True)]
    gate_pair, up_pair, down = pairs if trials else (pair[0] for pair in pairs)
    return gate_pair, up_pair, down


def swiglu_pair_gradients(
    grad: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    gate_columns: tuple[int, int],
    up_columns: tuple[int, int],
    ds_down: Tensor,
    down_rank: int,
    out: Tensor,
    trials: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `swiglu_backward` and the adapter gradients that its results give, which are rounded to the dtype first.

    Rows of all tensors may have any row stride. A rank of 0 leaves a module out; none is above 64.

    Args:
        grad: Gradient of h, `[T, F]`, F a multiple of 8.
        gate_up: `[T, 2F]`, what `swiglu` was given.
        xa: `[T, R]`: the input of gate and up times their down-projections, in the columns named below; other columns
            may hold anything. Fastest if their first columns are even and R leaves 16 columns (or the next power of
            two that holds a rank) from each.
        gate_columns: First column and rank of gate's pair.
        up_columns: First column and rank of up's pair.
        ds_down: `[T, >= down_rank]`: gradient of the down layer's output times its up-projection; fastest if 16 wide.
        down_rank: How many columns of `ds_down` count; others may hold anything.
        out: Where the gradients of gate and up go, `[T, 2F]`; may be `gate_up` itself.
        trials: n, if the rows are those of so many trials, one after another and T / n each: products are of a trial's
            own rows, and have n as a first dimension.

    Returns:
        `(d gate_pair [F, r_gate], d up_pair [F, r_up], d down [down_rank, F])`, each matrix contiguous, in float32
        (float64 for float64 inputs).
    """
    if is_fake(gate_up):
        ranks = gate_columns[1], up_columns[1], down_rank
        n = () if trials is None else (trials,)
        d_gate, d_up, d_down = (gate_up.new_empty(*n, grad.shape[1], rank, dtype=torch.float32) for rank in ranks)
        return d_gate, d_up, d_down.mT
    run = swiglu_pair_gradients_triton if use_triton(gate_up) else swiglu_pair_gradients_reference
    return run(grad, gate_up, xa, gate_columns, up_columns, ds_down, down_rank, out, trials)
