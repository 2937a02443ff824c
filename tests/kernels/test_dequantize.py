"""Dequantization is bit-equal to bitsandbytes, wherever the weight, the pair and the padding go."""

import copy

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from lsr_scale.kernels import dequantize as ops
from tests.kernels.checks import compile_for, poisoned, strided

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# the interpreter cuts float32 to bfloat16 instead of rounding it: those values are checked on a GPU
KERNEL_DTYPES = DTYPES if torch.cuda.is_available() else DTYPES[:2]


def quantized(num_rows, in_features, block_size, kind, nested, dtype, device):
    """Return bitsandbytes' packed weight and state, and what it decodes them to."""
    torch.manual_seed(num_rows + in_features)
    weight = (torch.randn(num_rows, in_features) * 0.02).to(dtype).to(device)
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=nested
    )
    if device == "cpu" and in_features % block_size:
        # bitsandbytes' AVX512 code takes wrong scales where blocks straddle rows; its generic code is right
        absmax = state.absmax
        if nested:
            absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        shape = (num_rows, in_features)
        return (
            packed,
            state,
            _dequantize_4bit_compute.__wrapped__(packed.view(-1), absmax, state.code, block_size, shape, dtype),
        )
    return packed, state, bnb_functional.dequantize_4bit(packed, state)


def arguments(state) -> dict:
    """Return a quantization state as the arguments of `dequantize_4bit`."""
    nested = None
    if state.nested:
        nested = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return dict(absmax=state.absmax, code=state.code, block_size=state.blocksize, nested=nested)


def pair(num_rows, in_features, tail, rank, padding, up_column, dtype, device):
    """Return a poisoned scratch as `out` and `down_out`, and a pair whose rows are strided."""
    scratch = poisoned((num_rows + rank + padding, in_features + tail + 8), dtype, device)
    out = scratch[:num_rows, : in_features + tail]
    down_out = scratch[num_rows:, :in_features]
    up = strided(torch.randn(num_rows, rank, device=device), 3)
    down = strided(torch.randn(rank, in_features, device=device), 5)
    return scratch, out, ops.Extension(up, up_column, down, down_out)


def check(scratch, out, weight, extension):
    """Fail unless every element is right to the bit, and nothing else was written."""
    up, up_column, down, down_out = extension
    num_rows, in_features = weight.shape
    tail = torch.zeros(num_rows, out.shape[1] - in_features, dtype=out.dtype, device=out.device)
    if up is not None:
        tail[:, up_column : up_column + up.shape[1]] = up.to(out.dtype)
    rows = torch.zeros_like(down_out)
    if down is not None:
        rows[: down.shape[0]] = down.to(out.dtype)
    assert torch.equal(out[:, :in_features], weight)
    assert torch.equal(out[:, in_features:], tail)
    assert torch.equal(down_out, rows)
    assert scratch[:, out.shape[1] :].isnan().all(), "wrote beyond the rows of out"
    assert scratch[num_rows:, in_features:].isnan().all(), "wrote beyond the rows of down_out"


@pytest.mark.parametrize(
    ("kind", "nested", "block_size", "shape"),
    [
        ("nf4", True, 64, (96, 192)),
        ("fp4", False, 128, (7, 384)),
        ("nf4", True, 32, (257, 160)),
        ("nf4", True, 64, (31, 96)),  # blocks straddle rows
        ("nf4", False, 4096, (40, 200)),  # a block of many rows, the last one partial
        ("fp4", True, 2048, (24, 328)),
        ("nf4", True, 64, (1, 64)),
        ("nf4", False, 64, (1, 8)),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "variant"), [*((dtype, {}) for dtype in KERNEL_DTYPES), (DTYPES[0], {"vectors": 256})]
)
def test_4bit_is_bit_equal_to_bitsandbytes(kind, nested, block_size, shape, dtype, variant, device):
    packed, state, weight = quantized(*shape, block_size, kind, nested, dtype, device)
    scratch, out, extension = pair(*shape, 24, 5, 2, 8, dtype, device)
    ops.dequantize_4bit_triton(packed, out=out, **arguments(state), extension=extension, **variant)
    check(scratch, out, weight, extension)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_reference_is_bit_equal_to_bitsandbytes(kind, block_size, dtype, nested):
    packed, state, weight = quantized(37, 232, block_size, kind, nested, dtype, "cpu")
    scratch, out, extension = pair(37, 232, 64, 16, 48, 48, dtype, "cpu")
    ops.dequantize_4bit(packed, out=out, **arguments(state), extension=extension)
    check(scratch, out, weight, extension)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_int8_is_bit_equal_to_bitsandbytes(dtype, scale_dtype, device):
    for shape in [(96, 192), (31, 1000), (1, 8)]:
        torch.manual_seed(shape[0])
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.rand(shape[0], device=device).to(scale_dtype)
        weight = bnb_functional.int8_vectorwise_dequant(codes, scales.float()).to(dtype)
        for run in (ops.dequantize_int8_triton, ops.dequantize_int8_reference):
            scratch, out, extension = pair(*shape, 64, 4, 3, 60, dtype, device)
            run(codes, scales, out, extension=extension)
            check(scratch, out, weight, extension)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_copy_of_an_unquantized_weight(dtype, device):
    for weight_dtype in DTYPES:
        weight = strided(torch.randn(33, 40, device=device).to(weight_dtype), 8)
        for run in (lambda *a, **k: ops.dequantize_int8_triton(a[0], None, *a[1:], **k), ops.copy_weight):
            scratch, out, extension = pair(33, 40, 16, 2, 1, 3, dtype, device)
            run(weight, out, extension=extension)
            check(scratch, out, weight.to(dtype), extension)


@pytest.mark.parametrize("run", [ops.fill_extension_triton, ops.fill_extension_reference])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_pair_alone_leaves_the_weight_as_it_is(run, dtype, device):
    weight = torch.randn(70, 40, device=device).to(dtype)
    scratch, out, extension = pair(70, 40, 64, 16, 48, 5, dtype, device)
    out[:, :40] = weight
    run(out[:, 40:], extension)
    check(scratch, out, weight, extension)
    run(out[:, 40:], ops.Extension(down_out=extension.down_out))  # and without one the padding is zero
    check(scratch, out, weight, ops.Extension(down_out=extension.down_out))
    with pytest.raises(ValueError, match="does not fit"):
        run(out[:, 40:], ops.Extension(extension.up, 60))


@pytest.mark.parametrize("run", [ops.fill_extension_triton, ops.fill_extension_reference])
def test_a_pair_in_matrices_of_its_own(run, device):
    up, down = torch.randn(70, 5, device=device), torch.randn(5, 2051, device=device)
    ups, downs = poisoned((70, 16), torch.float32, device), poisoned((16, 2051), torch.float32, device)
    run(ups, ops.Extension(up, 3, down, downs))
    assert torch.equal(ups, torch.nn.functional.pad(up, (3, 8)))
    assert torch.equal(downs, torch.nn.functional.pad(down, (0, 0, 0, 11)))
    ups = poisoned((70, 16), torch.float32, device)
    run(ups, ops.Extension(up, 11))
    assert torch.equal(ups, torch.nn.functional.pad(up, (11, 0)))
    with pytest.raises(ValueError, match=r"down \(5, 2051\) does not fit"):
        run(ups, ops.Extension(up, 3, down, downs[:, :2048]))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        run(ups, ops.Extension(down_out=downs.double()))


@pytest.mark.parametrize("run", [ops.dequantize_4bit_triton, ops.dequantize_4bit_reference])
def test_without_a_pair_the_padding_is_zero(run, device):
    packed, state, weight = quantized(9, 64, 64, "nf4", True, torch.float16, device)
    scratch = poisoned((9 + 4, 64 + 100), torch.float16, device)
    extension = ops.Extension(down_out=scratch[9:, :64])
    run(packed, out=scratch[:9, : 64 + 100], **arguments(state), extension=extension)
    check(scratch, scratch[:9], weight, extension)
    alone = poisoned((9, 64), torch.float16, device)
    run(packed, out=alone, **arguments(state))
    assert torch.equal(alone, weight)


@pytest.mark.parametrize("run", [ops.dequantize_4bit_triton, ops.dequantize_4bit_reference])
def test_narrow_statistics_of_a_prequantized_checkpoint(run, device):
    packed, state, _ = quantized(16, 64, 64, "nf4", True, torch.float32, device)
    state.offset = state.offset.bfloat16()
    state.state2.absmax = state.state2.absmax.bfloat16()
    plain = copy.copy(state)
    plain.nested = False
    plain.absmax = state.state2.code[state.absmax.long()] * state.state2.absmax.float() + state.offset.float()
    actual = poisoned((16, 64), torch.float32, device)
    run(packed, out=actual, **arguments(state))
    assert torch.equal(actual, bnb_functional.dequantize_4bit(packed, plain))
    narrow = plain.absmax.bfloat16()
    run(packed, narrow, state.code, actual, block_size=64)
    plain.absmax = narrow.float()
    assert torch.equal(actual, bnb_functional.dequantize_4bit(packed, plain))


def test_byte_views_and_shapes_that_do_not_fit():
    packed, state, weight = quantized(16, 64, 64, "nf4", False, torch.float32, "cpu")
    out = poisoned((16, 64), torch.float32)
    ops.dequantize_4bit(packed.view(1, -1).view(torch.bfloat16), out=out, **arguments(state))
    assert torch.equal(out, weight)
    for run in (ops.dequantize_4bit, ops.dequantize_4bit_triton):
        with pytest.raises(ValueError, match="does not fit 15 rows"):
            run(packed, out=poisoned((15, 64), torch.float32), **arguments(state))
        with pytest.raises(ValueError, match="does not fit 16 rows of at most 56"):
            run(packed, out=poisoned((16, 56), torch.float32), **arguments(state))
        with pytest.raises(ValueError, match="unit column stride"):
            run(packed, out=poisoned((64, 16), torch.float32).T, **arguments(state))
        wide = poisoned((16, 68), torch.float32)
        with pytest.raises(ValueError, match=r"up \(16, 4\) at column 1 does not fit"):
            run(packed, out=wide, extension=ops.Extension(torch.ones(16, 4), 1), **arguments(state))
        with pytest.raises(ValueError, match="without down_out"):
            run(packed, out=out, extension=ops.Extension(down=torch.ones(4, 64)), **arguments(state))
    with pytest.raises(ValueError, match="int8 codes and 16 scales"):
        ops.dequantize_int8(torch.zeros(16, 64, dtype=torch.int8), torch.ones(15), out)
    with pytest.raises(ValueError, match="does not fit out"):
        ops.copy_weight(torch.zeros(16, 72), out)


@pytest.mark.parametrize(
    ("vectors", "num_warps", "kind"),
    [*((512, 4, kind) for kind in ("4bit", "int8", "copy", "none")), (1024, 8, "4bit")],
)
def test_compiles_for_ampere_and_hopper(kind, vectors, num_warps):
    names = [
        "weight_row_stride",
        "out_row_stride",
        "num_rows",
        "tail_row_stride",
        "num_tail",
        "up_row_stride",
        "up_column",
        "up_rank",
    ]
    names += ["down_row_stride", "down_rank", "num_columns", "down_out_row_stride"]
    weight, scales = {
        "4bit": ("*u8", "*u8"),
        "int8": ("*i8", "*fp32"),
        "copy": ("*bf16", "*bf16"),
        "none": ("*bf16", "*bf16"),
    }[kind]
    signature = dict(
        weight=weight, scales=scales, out="*bf16", tail="*bf16", up="*fp32", down="*fp32", down_out="*bf16"
    )
    signature |= dict.fromkeys(["code", "absmax2", "code2", "offset"], "*fp32") | dict.fromkeys(names, "i32")
    constexprs = dict(KIND=kind, NESTED=kind == "4bit", HAS_UP=True, HAS_DOWN=True, ROW_VECTORS=512, BLOCK_VECTORS=8)
    constexprs |= dict(BLOCK2=256, ONE_OVER_127=1 / 127, VECTORS=vectors)
    constexprs |= dict(TAIL_ROWS=32, TAIL_COLUMNS=64, DOWN_COLUMNS=2048)
    for metadata in compile_for(ops._dequantize_kernel, signature, constexprs, num_warps).values():
        assert metadata.shared <= 16 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: bit-equality on 7B shapes in bf16")
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336)])
@pytest.mark.parametrize("nested", [False, True])
def test_7b_shapes_on_a_gpu(shape, nested):
    packed, state, weight = quantized(*shape, 64, "nf4", nested, torch.bfloat16, "cuda")
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    scales = torch.rand(shape[0], device="cuda")
    scratch, out, extension = pair(*shape, 64, 16, 48, 16, torch.bfloat16, "cuda")
    ops.dequantize_4bit_triton(packed, out=out, **arguments(state), extension=extension)
    check(scratch, out, weight, extension)
    scratch, out, extension = pair(*shape, 64, 16, 48, 16, torch.bfloat16, "cuda")
    ops.dequantize_int8(codes, scales, out, extension=extension)
    check(scratch, out, bnb_functional.int8_vectorwise_dequant(codes, scales).bfloat16(), extension)
    scratch, out, extension = pair(*shape, 64, 16, 48, 16, torch.bfloat16, "cuda")
    ops.copy_weight(weight, out, extension=extension)
    check(scratch, out, weight, extension)
