"""Weights in rotated int8: one rounding of the rotated values that `dequantize` gives in bfloat16."""

import math
from functools import partial

import pytest
import torch

from lsr_scale.kernels import dequantize_rotated as ops
from lsr_scale.kernels.hadamard import hadamard_matrix, int8_scale
from tests.kernels.checks import OnGpu, launched, strided
from tests.kernels.test_dequantize import arguments, quantized
from tests.kernels.test_dequantize_fp8 import float_values

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")

# memory that is not written
POISON = -128


def rotated_exactly(values):
    """Return the values, rounded to bfloat16 and rotated, in float64."""
    blocks = values.bfloat16().double().unflatten(1, (-1, 64))
    return (blocks @ hadamard_matrix(values.device, torch.float64) / 8).flatten(1)


def check(run, values, coarser=1.0):
    """Fail unless a run writes the codes of the values, each rounded once, and nothing beside them.

    Args:
        run: Called with `out` and `row_scales`.
        values: The weight `[N, K]` in float32.
        coarser: How much larger the scales are than what the largest values need; of less than 1 some saturate.
    """
    num_rows, in_features = values.shape
    matrix = torch.full((16 + num_rows + 32, in_features + 16), POISON, dtype=torch.int8, device=values.device)
    out = matrix[16 : 16 + num_rows, :in_features]
    rotated = rotated_exactly(values)
    row_scales = int8_scale(rotated.abs().amax(1)) * coarser
    run(out, row_scales)
    scaled = (rotated / row_scales.double()[:, None]).clamp(-127, 127)
    # to the nearest, but for what float32 loses in the sum and in the product with 1 / scale
    finite = scaled.isfinite().all(1)
    assert ((out.double() - scaled).abs()[finite] < 0.5005).all()
    # exact ties aside, float32 decides nearly always as float64 does
    assert (out.double() == scaled.round())[finite].double().mean() > 0.99
    out.fill_(POISON)
    assert (matrix == POISON).all(), "wrote beyond the weight"


def four_bits(run, packed, state, out, row_scales, **options):
    """Run a dequantization of a 4-bit weight."""
    run(packed, out=out, row_scales=row_scales, **arguments(state), **options)


def plain_triton(weight, out, row_scales, **options):
    """Encode a plain weight by the kernel."""
    ops.dequantize_int8_rotated_triton(weight, None, out, row_scales, **options)


@pytest.mark.parametrize(
    ("kind", "nested", "block_size", "shape"),
    [
        ("nf4", True, 64, (96, 192)),
        ("fp4", False, 128, (16, 384)),
        ("nf4", True, 32, (72, 320)),
        ("nf4", False, 4096, (40, 192)),  # a block of many rows, the last one partial
        ("fp4", True, 256, (48, 576)),  # blocks straddle rows
        ("nf4", True, 64, (24, 576)),
        ("nf4", True, 128, (33, 896)),
        ("nf4", False, 64, (1, 64)),
    ],
)
def test_4bit(kind, nested, block_size, shape, device):
    packed, state, _ = quantized(*shape, block_size, kind, nested, torch.float32, device)
    values = float_values(packed, state, shape)
    for options in ({}, {"vectors": 64, "num_warps": 4}):
        kernel = partial(four_bits, ops.dequantize_4bit_rotated_triton, packed, state, **options)
        check(kernel, values)
        if shape == (96, 192):
            check(kernel, values, 0.3)  # saturates
            check(kernel, values, 5.0)
    check(partial(four_bits, ops.dequantize_4bit_rotated, packed, state), values)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [ops.dequantize_int8_rotated_triton, ops.dequantize_int8_rotated])
def test_int8(run, scale_dtype, device):
    for shape in [(96, 192), (40, 1088), (1, 64)]:
        torch.manual_seed(shape[0])
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.rand(shape[0], device=device).to(scale_dtype)
        values = codes * scales.float()[:, None] * ops.ONE_OVER_127
        check(partial(run, codes, scales), values)
        check(partial(run, codes, scales), values, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [plain_triton, ops.encode_rotated])
def test_a_plain_weight(run, dtype, device):
    torch.manual_seed(0)
    for shape in [(48, 64), (33, 320)]:
        weight = strided(torch.randn(shape, device=device).to(dtype), 8)
        weight[3] = 0
        weight[5, 7] = 50  # an outlier
        weight[6, 1], weight[7, 1], weight[8, 1] = math.nan, math.inf, -math.inf
        check(partial(run, weight), weight.float())


def test_a_kernel_gives_the_codes_of_its_reference(device):
    """Of sums that are exact in float32: bit for bit, with ties to even."""
    torch.manual_seed(0)
    weight = torch.randint(-3, 4, (64, 256), device=device).float()
    # halves, quarters and eighths
    row_scales = torch.tensor([0.25, 0.125, 0.5, 1.0], device=device).repeat(16)
    outs = [torch.full((64, 256), POISON, dtype=torch.int8, device=device) for _ in range(2)]
    plain_triton(weight, outs[0], row_scales)
    ops.encode_rotated_reference(weight, outs[1], row_scales)
    assert torch.equal(outs[0], outs[1])
    ties = rotated_exactly(weight) / row_scales.double()[:, None] % 1 == 0.5
    assert ties.sum() > 100
    assert (outs[0][ties] % 2 == 0).all()


def test_block_sizes_that_no_kernel_takes_go_through_torch():
    packed, state, _ = quantized(12, 64, 64, "nf4", True, torch.float32, "cpu")
    state.absmax, state.blocksize = state.absmax.repeat_interleave(8), 8
    values = float_values(packed, state, (12, 64))
    check(partial(four_bits, ops.dequantize_4bit_rotated, packed, state), values)
    out, scales = torch.empty(12, 64, dtype=torch.int8), torch.ones(12)
    with pytest.raises(ValueError, match="whole vectors of 16"):
        four_bits(ops.dequantize_4bit_rotated_triton, packed, state, out, scales)


def test_what_does_not_fit_is_refused():
    packed, state, _ = quantized(16, 64, 64, "nf4", False, torch.float32, "cpu")
    known, ones = arguments(state), torch.ones(16)
    out = torch.empty(16, 64, dtype=torch.int8)
    for run in (ops.dequantize_4bit_rotated, ops.dequantize_4bit_rotated_triton):
        with pytest.raises(ValueError, match=r"512 bytes does not fit out \(15, 64\)"):
            run(packed, out=out[:15], row_scales=ones[:15], **known)
        with pytest.raises(ValueError, match="multiple of 64 columns"):
            run(packed, out=out.view(32, 32), row_scales=ones, **known)
        with pytest.raises(ValueError, match="unit column stride"):
            run(packed, out=torch.empty(64, 64, dtype=torch.int8)[:, :16].t(), row_scales=ones, **known)
        with pytest.raises(ValueError, match="rows of int8"):
            run(packed, out=torch.empty(16, 64), row_scales=ones, **known)
        for scales in (ones[:15], ones.double(), torch.ones(32)[::2]):
            with pytest.raises(ValueError, match="expected 16 contiguous in float32"):
                run(packed, out=out, row_scales=scales, **known)
    with pytest.raises(ValueError, match="int8 codes and 16 scales"):
        ops.dequantize_int8_rotated(torch.zeros(16, 64, dtype=torch.int8), torch.ones(15), out, ones)
    with pytest.raises(ValueError, match=r"weight \(64, 16\) does not fit"):
        ops.encode_rotated(torch.zeros(64, 16), out, ones)


def all_kinds(shape, nested_alone=False):
    """Encode weights of all kinds, or in 4 bits with nested statistics, into rows of a group's matrix."""
    num_rows, in_features = shape
    out = OnGpu.empty(2 * num_rows, in_features, dtype=torch.int8)[num_rows:]
    code, row_scales = torch.zeros(256), torch.ones(num_rows)
    for nested in ((code, code, code[:1], 256), None)[: 2 - nested_alone]:
        absmax = torch.zeros(num_rows * in_features // 64, dtype=torch.float32 if nested is None else torch.uint8)
        packed = torch.zeros(num_rows * in_features // 2, 1, dtype=torch.uint8)
        ops.dequantize_4bit_rotated(packed, absmax, code[:16], out, row_scales, block_size=64, nested=nested)
    if nested_alone:
        return
    ops.dequantize_int8_rotated(torch.zeros(num_rows, in_features, dtype=torch.int8), row_scales, out, row_scales)
    for dtype in (torch.bfloat16, torch.float32):
        ops.encode_rotated(OnGpu.empty(num_rows, in_features, dtype=dtype), out, row_scales)


@pytest.mark.parametrize(
    ("shape", "nested_alone", "capabilities"),
    [((1024, 4096), False, (89, 100)), ((1024, 4096), True, (80, 86, 90, 120)), ((896, 576), True, (90,))],
)
def test_compiles_for_every_gpu(shape, nested_alone, capabilities):
    compiled = launched(all_kinds, shape, nested_alone, shared_bytes=99 * 1024, capabilities=capabilities)
    assert {name for name, _, _ in compiled} == {"_dequantize_rotated_kernel"}
    assert len(compiled) == (1 if nested_alone else 5) * len(capabilities)
    # a tile of 256 blocks in bfloat16, or one in float32 as the weight is stored, and H
    assert max(shared for _, _, shared in compiled) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 7B shapes")
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (14336, 4096)])
def test_7b_shapes_on_a_gpu(shape):
    packed, state, weight = quantized(*shape, 64, "nf4", True, torch.bfloat16, "cuda")
    values = float_values(packed, state, shape)
    check(partial(four_bits, ops.dequantize_4bit_rotated, packed, state), values)
    check(partial(ops.encode_rotated, weight), weight.float())
