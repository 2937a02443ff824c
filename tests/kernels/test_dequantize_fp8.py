"""Weights straight to e4m3: one rounding of the values that `dequantize` gives in float32, in both orientations."""

import math
from functools import partial

import pytest
import torch

from lsr_scale.kernels import dequantize
from lsr_scale.kernels import dequantize_fp8 as ops
from lsr_scale.kernels.fp8 import E4M3, power_of_two_scale
from tests.kernels.checks import OnGpu, launched, strided
from tests.kernels.test_dequantize import arguments, quantized

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")

# memory that is not written: NaN
POISON = 0x7F


def views(num_rows, in_features, transposed, device):
    """Return a poisoned matrix of a group, and the rows or columns of it that a weight goes to."""
    if transposed:
        matrix = torch.full((in_features, 16 + num_rows + 32), POISON, dtype=torch.uint8, device=device)
        return matrix, matrix.view(E4M3)[:, 16 : 16 + num_rows]
    matrix = torch.full((16 + num_rows + 32, in_features + 16), POISON, dtype=torch.uint8, device=device)
    return matrix, matrix.view(E4M3)[16 : 16 + num_rows, :in_features]


def check(run, values, weight_scale, transposed):
    """Fail unless a run writes the codes of the values, each rounded once, and nothing beside them."""
    num_rows, in_features = values.shape
    matrix, out = views(num_rows, in_features, transposed, values.device)
    run(out, weight_scale, transposed=transposed)
    # float64: division, clamping and rounding each exact
    codes = (values.double() / weight_scale.double()).clamp(-448, 448).to(E4M3).view(torch.uint8)
    codes = codes.t() if transposed else codes
    assert torch.equal(out.view(torch.uint8), codes)
    out.view(torch.uint8).fill_(POISON)
    assert (matrix == POISON).all(), "wrote beyond the weight"


def scale(value, device="cpu"):
    return torch.tensor([value], dtype=torch.float32, device=device)


def float_values(packed, state, shape):
    """Return the 4-bit weight in float32."""
    out = torch.empty(shape, device=packed.device)
    dequantize.dequantize_4bit_reference(packed, out=out, **arguments(state))
    return out


def four_bits(run, packed, state, out, weight_scale, **options):
    """Run a dequantization of a 4-bit weight."""
    run(packed, out=out, weight_scale=weight_scale, **arguments(state), **options)


def plain_triton(weight, out, weight_scale, **options):
    """Encode a plain weight by the kernel."""
    ops.dequantize_int8_fp8_triton(weight, None, out, weight_scale, **options)


@pytest.mark.parametrize(("transposed", "small"), [(False, False), (True, True)])
@pytest.mark.parametrize(
    ("kind", "nested", "block_size", "shape"),
    [
        ("nf4", True, 64, (96, 192)),
        ("fp4", False, 128, (16, 384)),
        ("nf4", True, 32, (272, 160)),
        ("nf4", True, 64, (48, 96)),  # blocks straddle rows
        ("nf4", False, 4096, (40, 208)),  # a block of many rows, the last one partial
        ("fp4", True, 2048, (144, 80)),
        ("nf4", True, 64, (64, 576)),
        ("nf4", False, 64, (1, 16)),
    ],
)
def test_4bit(kind, nested, block_size, shape, transposed, small, device):
    packed, state, _ = quantized(*shape, block_size, kind, nested, torch.float32, device)
    values = float_values(packed, state, shape)
    weight_scale = power_of_two_scale(values.abs().amax().view(1))
    tile = {"vectors": 4 if transposed else 128, "rows": 64} if small else {}
    kernel = partial(four_bits, ops.dequantize_4bit_fp8_triton, packed, state, **tile)
    check(kernel, values, weight_scale, transposed)
    check(partial(four_bits, ops.dequantize_4bit_fp8, packed, state), values, weight_scale, transposed)


@pytest.mark.parametrize(("transposed", "small"), [(False, False), (False, True), (True, False), (True, True)])
def test_4bit_out_of_range(transposed, small, device):
    packed, state, _ = quantized(96, 192, 64, "nf4", True, torch.float32, device)
    values = float_values(packed, state, (96, 192))
    weight_scale = power_of_two_scale(values.abs().amax().view(1))
    tile = {"vectors": 4 if transposed else 128, "rows": 64} if small else {}
    kernel = partial(four_bits, ops.dequantize_4bit_fp8_triton, packed, state, **tile)
    check(kernel, values, weight_scale / 16, transposed)  # saturates
    check(kernel, values, weight_scale * 2**12, transposed)  # underflows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [ops.dequantize_int8_fp8_triton, ops.dequantize_int8_fp8])
def test_int8(run, scale_dtype, transposed, device):
    for shape in [(96, 192), (40, 1008), (1, 16)]:
        torch.manual_seed(shape[0])
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.rand(shape[0], device=device).to(scale_dtype)
        values = torch.empty(shape, device=device)
        dequantize.dequantize_int8_reference(codes, scales, values)
        for weight_scale in (2.0**-8, 2.0**-12, 2.0**6):
            check(partial(run, codes, scales), values, scale(weight_scale, device), transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plain_weight(dtype, transposed, device):
    torch.manual_seed(0)
    for run in (plain_triton, ops.encode_weight):
        for shape in [(48, 80), (136, 272)]:
            weight = strided(torch.randn(shape, device=device).to(dtype), 8)
            weight[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
            for weight_scale in (1.0, 2.0**-10, 2.0**6):
                check(partial(run, weight), weight.float(), scale(weight_scale, device), transposed)


def test_ties_go_to_the_even_code(device):
    # halfway between neighbouring codes, among subnormal ones too
    weight = torch.tensor([1 + 1 / 16, 1 + 3 / 16, -(1 + 1 / 16), 2.0**-10, 3 * 2.0**-10, 464, 1e9, -1e9] * 2)
    expected = torch.tensor([1, 1.25, -1, 0, 2.0**-8, 448, 448, -448] * 2)
    weight, expected = weight.to(device).expand(16, 16), expected.to(device).expand(16, 16)
    for transposed in (False, True):
        for run in (plain_triton, ops.encode_weight):
            out = torch.empty(16, 16, dtype=E4M3, device=device)
            run(weight, out, scale(1.0, device), transposed=transposed)
            assert torch.equal(out.float(), expected.t() if transposed else expected)


def test_shapes_that_no_kernel_takes_go_through_torch():
    packed, state, _ = quantized(12, 24, 64, "nf4", True, torch.float32, "cpu")
    values = float_values(packed, state, (12, 24))
    for transposed in (False, True):
        check(partial(four_bits, ops.dequantize_4bit_fp8, packed, state), values, scale(2.0**-12), transposed)


def test_what_does_not_fit_is_refused():
    packed, state, _ = quantized(16, 64, 64, "nf4", False, torch.float32, "cpu")
    known, one = arguments(state), scale(1.0)
    out = torch.empty(16, 64, dtype=E4M3)
    for run in (ops.dequantize_4bit_fp8, ops.dequantize_4bit_fp8_triton):
        with pytest.raises(ValueError, match="512 bytes does not fit 15 rows of 64"):
            run(packed, out=out[:15], weight_scale=one, **known)
        with pytest.raises(ValueError, match="unit column stride"):
            run(packed, out=out.t(), weight_scale=one, transposed=True, **known)
        with pytest.raises(ValueError, match="float8_e4m3fn"):
            run(packed, out=torch.empty(16, 64), weight_scale=one, **known)
        with pytest.raises(ValueError, match="one float32"):
            run(packed, out=out, weight_scale=torch.ones(16), **known)
    with pytest.raises(ValueError, match="whole vectors of 16"):
        ops.dequantize_4bit_fp8_triton(packed, out=out.view(128, 8), weight_scale=one, **known)
    with pytest.raises(ValueError, match="int8 codes and 16 scales"):
        ops.dequantize_int8_fp8(torch.zeros(16, 64, dtype=torch.int8), torch.ones(15), out, one)
    with pytest.raises(ValueError, match=r"weight \(64, 16\) does not fit"):
        ops.encode_weight(torch.zeros(64, 16), out, one)
    with pytest.raises(ValueError, match=r"weight \(16, 64\) does not fit"):
        ops.encode_weight(torch.zeros(16, 64), out, one, transposed=True)


def both_ways(shape, nested_alone=False):
    """Encode weights of all kinds, or in 4 bits with nested statistics, into rows and columns of a group's matrices."""
    num_rows, in_features = shape
    rows = OnGpu.empty(2 * num_rows, in_features, dtype=E4M3)[num_rows:]
    columns = OnGpu.empty(in_features, 2 * num_rows, dtype=E4M3)[:, num_rows:]
    code, one = torch.zeros(256), torch.ones(1)
    for out, transposed in ((rows, False), (columns, True)):
        for nested in ((code, code, code[:1], 256), None)[: 2 - nested_alone]:
            absmax = torch.zeros(num_rows * in_features // 64, dtype=torch.float32 if nested is None else torch.uint8)
            packed = torch.zeros(num_rows * in_features // 2, 1, dtype=torch.uint8)
            options = dict(block_size=64, nested=nested, transposed=transposed)
            ops.dequantize_4bit_fp8(packed, absmax, code[:16], out, one, **options)
        if nested_alone:
            continue
        codes = torch.zeros(num_rows, in_features, dtype=torch.int8)
        ops.dequantize_int8_fp8(codes, torch.zeros(num_rows), out, one, transposed=transposed)
        for dtype in (torch.bfloat16, torch.float32):
            ops.encode_weight(OnGpu.empty(num_rows, in_features, dtype=dtype), out, one, transposed=transposed)


@pytest.mark.parametrize(("nested_alone", "capabilities"), [(False, (90,)), (True, (89, 100, 120))])
def test_compiles_for_every_gpu_with_e4m3(nested_alone, capabilities):
    compiled = launched(both_ways, (1024, 4096), nested_alone, shared_bytes=99 * 1024, capabilities=capabilities)
    assert {name for name, _, _ in compiled} == {"_dequantize_fp8_kernel"}
    assert {capability for _, capability, _ in compiled} == set(capabilities)
    assert len(compiled) == (2 if nested_alone else 10) * len(capabilities)
    # a tile of 128 rows and 256 columns, 128 in float32, where that is how the weight is stored
    assert max(shared for _, _, shared in compiled) <= 68 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 7B shapes")
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("transposed", [False, True])
def test_7b_shapes_on_a_gpu(shape, transposed):
    packed, state, weight = quantized(*shape, 64, "nf4", True, torch.bfloat16, "cuda")
    values = float_values(packed, state, shape)
    weight_scale = power_of_two_scale(values.abs().amax().view(1))
    check(partial(four_bits, ops.dequantize_4bit_fp8, packed, state), values, weight_scale, transposed)
    check(partial(ops.encode_weight, weight), weight.float(), weight_scale, transposed)
