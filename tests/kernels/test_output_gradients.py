"""The gradients that adapters take from an output gradient, from one read of it."""

import pytest
import torch

from lsr_scale.kernels import output_gradients as ops
from tests.kernels.checks import assert_close_to_float64, compile_for, poisoned, strided

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")

# tl.dot of bfloat16 gives garbage in the interpreter
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def case(num_rows, sizes, ranks, num_columns, dtype, device):
    """Return strided, poisoned operands of a group, its offsets, and the float64 gradients of each adapter."""
    torch.manual_seed(num_rows)
    N = sum(sizes)
    buffer = poisoned((num_rows, N + num_columns), dtype, device)
    buffer[:, :N] = torch.randn(num_rows, N, device=device)
    grad, ds_out = buffer[:, :N], buffer[:, N:]
    xa = strided(torch.randn(num_rows, num_columns, device=device).to(dtype), 3)
    up = torch.zeros(N, num_columns, device=device)
    offsets = []
    row = column = 0
    for size, rank in zip(sizes, ranks, strict=True):
        up[row : row + size, column : column + rank] = torch.randn(size, rank, device=device)
        offsets += [column] * -(-size // 64)
        row, column = row + size, column + rank
    return grad, ds_out, xa, strided(up.to(dtype), 40), torch.tensor(offsets, dtype=torch.int32, device=device)


def check(grad, ds_out, xa, up, sizes, ranks, offsets, width, **blocks):
    """Fail unless both results are right in float64's measure, padding included, and the same a second time."""
    before = grad.clone()
    ds, d_up = ops.output_gradients_triton(grad, xa, up, offsets, width, ds_out=ds_out, **blocks)
    floor = FLOOR[grad.dtype]
    assert ds.data_ptr() == ds_out.data_ptr()
    assert torch.equal(grad, before)
    assert_close_to_float64(ds, grad.double() @ up.double(), grad @ up, floor)
    full = torch.nn.functional.pad(xa, (0, width))
    row = column = 0
    for size, rank in zip(sizes, ranks, strict=True):
        inputs = full[:, column : column + width]
        part = grad[:, row : row + size]
        actual = d_up[row : row + size]
        assert_close_to_float64(actual, part.double().t() @ inputs.double(), part.t() @ inputs, floor)
        row, column = row + size, column + rank
    assert d_up.dtype == torch.float32
    again = ops.output_gradients_triton(grad, xa, up, offsets, width, **blocks)
    assert torch.equal(again[0], ds)
    assert torch.equal(again[1], d_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "sizes", "ranks", "num_columns", "width", "blocks"),
    [
        (128, [128, 64, 64], [16, 16, 16], 64, 16, dict(block_t=32)),
        (77, [64, 64, 40], [4, 5, 3], 64, 16, dict(block_t=32, parts=2)),  # odd rows, ranks and last block
        (1, [128], [16], 64, 16, dict(block_t=16)),
        (65, [64, 192], [8, 20], 40, 32, dict(block_t=64, parts=4)),  # R is no power of two
        (50, [64, 128], [4, 60], 64, 64, dict(block_t=16, parts=3)),  # one part has no block
        (300, [72], [64], 64, 64, dict(block_t=16, parts=1)),  # more tiles than the reduction takes at a time
        (30, [64], [8], 8, 16, dict(block_t=32, parts=1)),
        (130, [136], [128], 128, 64, {}),
    ],
)
def test_against_float64(num_rows, sizes, ranks, num_columns, width, blocks, dtype, device):
    grad, ds_out, xa, up, offsets = case(num_rows, sizes, ranks, num_columns, dtype, device)
    check(grad, ds_out, xa, up, sizes, ranks, offsets, width, **blocks)


def test_columns_beyond_the_group_are_zero(device):
    grad, _, xa, up, offsets = case(40, [64, 64], [4, 4], 8, torch.float32, device)
    for run in (ops.output_gradients_triton, ops.output_gradients_reference):
        _, d_up = run(grad, xa, up, offsets, 16)
        assert not d_up[:64, 8:].any()
        assert not d_up[64:, 4:].any()
        assert d_up[64:, :4].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_reference(dtype):
    sizes, ranks, width = [64, 64, 40], [4, 5, 3], 16
    grad, ds_out, xa, up, offsets = case(77, sizes, ranks, 64, dtype, "cpu")
    ds, d_up = ops.output_gradients(grad, xa, up, offsets, width, ds_out=ds_out)
    assert ds.data_ptr() == ds_out.data_ptr()
    assert_close_to_float64(ds, grad.double() @ up.double(), grad @ up, 1e-15)
    start = 0
    for size, column in zip(sizes, [0, 4, 9], strict=True):
        expected = grad[:, start : start + size].double().t() @ xa.double()[:, column : column + width]
        assert_close_to_float64(
            d_up[start : start + size], expected, expected, 1e-6 if dtype != torch.float64 else 1e-14
        )
        start += size


def test_shapes_that_do_not_fit():
    grad, xa, up, offsets = torch.ones(4, 64), torch.ones(4, 16), torch.ones(64, 16), torch.zeros(1, dtype=torch.int32)
    for run in (ops.output_gradients, ops.output_gradients_triton):
        with pytest.raises(ValueError, match="shapes do not fit"):
            run(grad, xa[:3], up, offsets, 16)
        with pytest.raises(ValueError, match="shapes do not fit"):
            run(grad, xa, up, offsets, 16, ds_out=torch.ones(4, 8))
        with pytest.raises(ValueError, match="expected one offset per 64"):
            run(grad, xa, up, offsets.repeat(2), 16)
        with pytest.raises(ValueError, match=r"expected torch.float32"):
            run(grad, xa.half(), up, offsets, 16)


@pytest.mark.parametrize(
    ("room", "tiles"),
    [
        (227, {16: (128, 3), 64: (128, 3), 128: (128, 3), 256: (64, 3)}),  # an H100's, measured
        (163, {64: (128, 3), 128: (128, 3), 256: (64, 3)}),
        (99, {64: (128, 3), 128: (64, 3), 256: (64, 2), 512: (16, 1)}),
    ],
)
def test_tiles_are_as_large_as_shared_memory_has_room_for(room, tiles):
    assert {columns: ops._tile(columns, 2, room * 1024) for columns in tiles} == tiles


def test_compiles_for_one_row():
    """Triton makes a constant of an argument that is 1."""
    sizes = dict(N=64, R=64, WIDTH=16, PARTS=2, BLOCK_N=64, num_rows=1)
    signature = dict.fromkeys(["grad", "xa", "up", "ds"], "*bf16") | dict.fromkeys(["ds_part", "d_up_part"], "*fp32")
    signature |= dict.fromkeys(["grad_row_stride", "xa_row_stride", "up_row_stride", "ds_row_stride"], "i32") | dict(
        offsets="*i32"
    )
    compile_for(ops._output_gradients_kernel, signature, sizes | dict(BLOCK_T=128, BLOCK_R=64), num_warps=8)
    signature = dict(ds_part="*fp32", ds="*bf16", d_up_part="*fp32", d_up="*fp32", offsets="*i32", ds_row_stride="i32")
    compile_for(ops._reduce_kernel, signature, sizes | dict(num_tiles=1, MAX_TILES=1, BLOCK_UP=256, BLOCK_DS=1024))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 7B shapes in bf16")
@pytest.mark.parametrize(
    ("sizes", "ranks", "width"), [([4096, 1024, 1024], [16, 16, 16], 16), ([4096], [64], 64), ([512], [128], 128)]
)
@pytest.mark.parametrize("num_rows", [8192, 1000])
def test_7b_shapes_on_a_gpu(sizes, ranks, width, num_rows):
    grad, ds_out, xa, up, offsets = case(num_rows, sizes, ranks, max(64, sum(ranks)), torch.bfloat16, "cuda")
    if len(ranks) == 3:
        up[:, 48:] = 0
        xa[:, 48:] = 0
    check(grad, ds_out, xa, up, sizes, ranks, offsets, width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: tiles of every size, pipelined")
@pytest.mark.parametrize("room", [99, 163, 227])
@pytest.mark.parametrize("ranks", [[32, 16, 16], [64, 33, 31], [64, 64, 64], [64, 128, 64]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiles_of_every_gpu_on_this_one(dtype, ranks, room):
    sizes, columns = [1024, 256, 512], sum(ranks)
    rows, stages = ops._tile(ops._power_of_two(columns), dtype.itemsize, room * 1024)
    if room * 1024 > ops.shared_memory(torch.empty(0, device="cuda")):
        pytest.skip("this GPU has less")
    grad, ds_out, xa, up, offsets = case(777, sizes, ranks, columns, dtype, "cuda")
    xa, up = xa.contiguous(), strided(up.contiguous(), 64)  # as layers have them: aligned, so loads are pipelined
    check(grad, ds_out, xa, up, sizes, ranks, offsets, 128, block_t=rows, num_stages=stages)
