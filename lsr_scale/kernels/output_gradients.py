"""Both products of an adapter group with the output gradient, from one read of it.

    ds = dY up                                            [T, R]
    d_up[n, j] = sum_t dY[t, n] xa[t, offset(n) + j]      [N, width], float32

Rows of `up` belong to several adapters, whose ranks are side by side in the R columns; `offset(n)` is where the
columns of row n's adapter begin (one value per 64 rows). Bytes: T N elements read once, instead of once per
product, plus float32 partial sums of `parts` times [T, R] and `T / BLOCK_T` times [N, width], written and read again:
a fixed order of summation, so the same gradients every time.
"""

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, shared_memory, tl, use_triton

# rows of `up` that share an offset
BLOCK_N = 64


def output_gradients_reference(
    grad: Tensor, xa: Tensor, up: Tensor, offsets: Tensor, width: int, *, ds_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `output_gradients` does in plain torch, in float64 for float64 and in float32 for any other dtype."""
    _check(grad, xa, up, offsets, width, ds_out)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    wide = grad.to(dtype)
    ds = (wide @ up.to(dtype)).to(grad.dtype)
    if ds_out is not None:
        ds = ds_out.copy_(ds)
    # columns beyond R count as zeros
    padded = torch.nn.functional.pad(xa.to(dtype), (0, width))
    full = wide.t() @ padded
    first = offsets.long().repeat_interleave(BLOCK_N)[: grad.shape[1], None]
    return ds, full.gather(1, first + torch.arange(width, device=grad.device))


@jit
def _output_gradients_kernel(
    grad,
    grad_row_stride,
    xa,
    xa_row_stride,
    up,
    up_row_stride,
    offsets,
    ds,
    ds_row_stride,
    ds_part,
    d_up_part,
    num_rows,
    N: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Take BLOCK_T rows of the gradient through one of PARTS ranges of columns.

    With one part `ds` is complete and stored in its own dtype; with several, `ds_part[part]` in float32.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    valid_rows = (rows < num_rows)[:, None]
    rows = rows.to(tl.int64)[:, None]
    nth = tl.arange(0, BLOCK_R)
    valid_r = (nth < R)[None, :]
    columns = tl.arange(0, BLOCK_N)
    inputs = tl.trans(tl.load(xa + rows * xa_row_stride + nth[None, :], mask=valid_rows & valid_r, other=0.0))
    acc = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
    part_blocks: tl.constexpr = ((N + BLOCK_N - 1) // BLOCK_N + PARTS - 1) // PARTS
    for step in range(part_blocks):
        block = part * part_blocks + step
        n = block * BLOCK_N + columns
        tile_grad = tl.load(grad + rows * grad_row_stride + n[None, :], mask=valid_rows & (n < N)[None, :], other=0.0)
        up_rows = up + n.to(tl.int64)[:, None] * up_row_stride
        tile_up = tl.load(up_rows + nth[None, :], mask=(n < N)[:, None] & valid_r, other=0.0)
        acc = tl.dot(tile_grad, tile_up, acc, input_precision="ieee")
        # d_up^T = xa^T dY: with dY as it is in both products, one copy in shared memory serves both and is pipelined;
        # all R rows, of which a block's own are stored: cheaper than to load the inputs again for each block
        product = tl.dot(inputs, tile_grad, input_precision="ieee")
        own = (nth - tl.load(offsets + block, mask=block * BLOCK_N < N, other=0))[:, None]
        target = d_up_part + (tile.to(tl.int64) * N + n)[None, :] * WIDTH + own
        tl.store(target, product, mask=(n < N)[None, :] & (nth < R)[:, None] & (own >= 0) & (own < WIDTH))
    if PARTS == 1:
        tl.store(ds + rows * ds_row_stride + nth[None, :], acc.to(ds.dtype.element_ty), mask=valid_rows & valid_r)
    else:
        target = ds_part + (part.to(tl.int64) * num_rows + rows) * R + nth[None, :]
        tl.store(target, acc, mask=valid_rows & valid_r)


@jit
def _reduce_kernel(
    ds_part,
    ds,
    ds_row_stride,
    d_up_part,
    d_up,
    offsets,
    num_rows,
    num_tiles,
    N: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_UP: tl.constexpr,
    BLOCK_DS: tl.constexpr,
):
    """Sum the partial `d_up` over row tiles (first programs) and the partial `ds` over parts (the others)."""
    program = tl.program_id(0)
    up_programs: tl.constexpr = (N * WIDTH + BLOCK_UP - 1) // BLOCK_UP
    if program < up_programs:
        i = program * BLOCK_UP + tl.arange(0, BLOCK_UP)
        valid = i < N * WIDTH
        # columns beyond R were never written
        column = tl.load(offsets + i // (WIDTH * BLOCK_N), mask=valid, other=0) + i % WIDTH
        written = valid & (column < R)
        acc = tl.full((BLOCK_UP,), 0.0, tl.float32)
        source = d_up_part + i
        for first in range(0, MAX_TILES, 16):
            for nth in tl.static_range(16):
                acc += tl.load(source, mask=written & (first + nth < num_tiles), other=0.0)
                source += N * WIDTH
        tl.store(d_up + i, acc, mask=valid)
    else:
        j = (program - up_programs).to(tl.int64) * BLOCK_DS + tl.arange(0, BLOCK_DS)
        size = tl.cast(num_rows, tl.int64) * R
        total = tl.full((BLOCK_DS,), 0.0, tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(ds_part + part * size + j, mask=j < size, other=0.0)
        tl.store(ds + j // R * ds_row_stride + j % R, total.to(ds.dtype.element_ty), mask=j < size)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def _tile(block_r: int, itemsize: int, shared_bytes: int) -> tuple[int, int]:
    """Return the rows of a program and its `num_stages` that fit into shared memory.

    Args:
        block_r: Columns of a tile of `up`.
        itemsize: Bytes of an element.
        shared_bytes: Shared memory that a program can have.
    """
    # a program holds a [rows, block_r] sum in registers; float32 has no tensor cores here
    max_rows = 32 if itemsize == 4 else 128 if block_r <= 128 else 64
    for stages in (3, 2, 1):
        for rows in (max_rows, max_rows // 2):
            # what Triton takes for sm_80: tiles of the gradient and of `up` in flight, the inputs, and a way between
            # layouts; sm_120 takes no more, and sm_90, which takes up to 32 KiB more, has the room
            tiles = max(1, stages - 1) * (rows + block_r) * BLOCK_N * itemsize
            if tiles + rows * block_r * itemsize + 16384 * (stages > 1) <= shared_bytes:
                return rows, stages
    return 16, 1


def output_gradients_triton(
    grad: Tensor,
    xa: Tensor,
    up: Tensor,
    offsets: Tensor,
    width: int,
    *,
    ds_out: Tensor | None = None,
    block_t: int | None = None,
    parts: int | None = None,
    num_warps: int = 8,
    num_stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `output_gradients` does in two Triton launches.

    Args:
        grad, xa, up, offsets, width, ds_out: As there.
        block_t: Rows per program, a power of two from 16; more of them mean less partial `d_up`. By default, like
            num_stages, as many as the GPU's shared memory has room for.
        parts: Ranges of columns, each with programs of its own (split K); more of them fill a GPU, and mean more
            partial `ds`.
        num_warps: Warps per program.
        num_stages: Of software pipelining: one more than the tiles of the gradient in flight.
    """
    _check(grad, xa, up, offsets, width, ds_out)
    num_rows, N = grad.shape
    R = up.shape[1]
    block_r = max(16, _power_of_two(R))
    rows, stages = _tile(block_r, grad.dtype.itemsize, shared_memory(grad))
    block_t, num_stages = block_t or rows, num_stages or stages
    num_tiles = -(-num_rows // block_t)
    if parts is None:
        # two programs for each of about 128 multiprocessors
        parts = min(4, _power_of_two(-(-256 // num_tiles)), -(-N // BLOCK_N))
    ds = torch.empty(num_rows, R, dtype=grad.dtype, device=grad.device) if ds_out is None else ds_out
    d_up = torch.empty(N, width, dtype=torch.float32, device=grad.device)
    ds_part = d_up if parts == 1 else torch.empty(parts, num_rows, R, dtype=torch.float32, device=grad.device)
    d_up_part = torch.empty(num_tiles, N, width, dtype=torch.float32, device=grad.device)
    _output_gradients_kernel[(num_tiles, parts)](
        grad,
        grad.stride(0),
        xa,
        xa.stride(0),
        up,
        up.stride(0),
        offsets,
        ds,
        ds.stride(0),
        ds_part,
        d_up_part,
        num_rows,
        N=N,
        R=R,
        WIDTH=width,
        PARTS=parts,
        BLOCK_T=block_t,
        BLOCK_N=BLOCK_N,
        BLOCK_R=block_r,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    block_up, block_ds = 256, 1024
    ds_programs = 0 if parts == 1 else -(-num_rows * R // block_ds)
    _reduce_kernel[(-(-N * width // block_up) + ds_programs,)](
        ds_part,
        ds,
        ds.stride(0),
        d_up_part,
        d_up,
        offsets,
        num_rows,
        num_tiles,
        N=N,
        R=R,
        WIDTH=width,
        PARTS=parts,
        # a power of two, so that batches of other lengths reuse the compiled kernel
        MAX_TILES=_power_of_two(num_tiles),
        BLOCK_N=BLOCK_N,
        BLOCK_UP=block_up,
        BLOCK_DS=block_ds,
        num_warps=4,
    )
    return ds, d_up


def _check(grad: Tensor, xa: Tensor, up: Tensor, offsets: Tensor, width: int, ds_out: Tensor | None) -> None:
    """Raise unless the shapes, dtypes and strides fit each other."""
    (num_rows, N), R = grad.shape, up.shape[1]
    ds_shape = (num_rows, R) if ds_out is None else tuple(ds_out.shape)
    if xa.shape != (num_rows, R) or up.shape[0] != N or ds_shape != (num_rows, R) or num_rows == 0:
        raise ValueError(
            f"shapes do not fit: grad {tuple(grad.shape)}, xa {tuple(xa.shape)}, up {tuple(up.shape)}, ds {ds_shape}"
        )
    if offsets.shape != (-(-N // BLOCK_N),) or width < 1:
        raise ValueError(
            f"offsets {tuple(offsets.shape)}, width {width}: expected one offset per {BLOCK_N} of {N} rows"
        )
    for x in (grad, xa, up, grad if ds_out is None else ds_out):
        if x.dtype != grad.dtype or x.stride(1) != 1:
            raise ValueError(f"expected {grad.dtype} and unit column stride, got {x.dtype}, strides {x.stride()}")


def output_gradients(
    grad: Tensor, xa: Tensor, up: Tensor, offsets: Tensor, width: int, *, ds_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients that a group of adapters takes from its output gradient.

    Args:
        grad: Output gradient dY, `[T, N]`; it and every other matrix may have any row stride.
        xa: Adapter activations `x down^T`, `[T, R]`, in the dtype of `grad`.
        up: Block-diagonal `up`, `[N, R]`, in the dtype of `grad`.
        offsets: int32 `[ceil(N / 64)]`, for each 64 rows of `up` the first column of their adapter.
        width: Columns of `d_up`, at least the largest rank.
        ds_out: `[T, R]` in the dtype of `grad`, to write `ds` to; it must not overlap `grad`'s own columns.

    Returns:
        `ds = grad @ up`, `[T, R]` in the dtype of `grad`, and `d_up`, float32 `[N, width]`: row n holds
        `grad[:, n] @ xa[:, offset : offset + width]`, with zeros where that passes R.

    Raises:
        ValueError: if shapes, dtypes or strides do not fit each other.
    """
    run = output_gradients_triton if use_triton(grad) else output_gradients_reference
    return run(grad, xa, up, offsets, width, ds_out=ds_out)
