"""Scales and codes of e4m3 against their definition, in torch and in a Triton kernel."""

import math

import pytest
import torch

from lsr_scale.kernels import fp8
from lsr_scale.kernels.backend import jit, tl
from lsr_scale.kernels.fp8 import E4M3, LARGEST, encode_reference, fp8_fallback_reason, power_of_two_scale, scale_of


def magnitudes():
    """Return float32 magnitudes: random ones of every exponent, and those around each power of two's turning point."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    random = (1 + torch.rand((16, len(exponents)), generator=generator, dtype=torch.float64)) * 2**exponents
    turning = (1.75 * 2**exponents).float()
    around = [turning, torch.nextafter(turning, torch.zeros(())), torch.nextafter(turning, torch.full((), math.inf))]
    special = torch.tensor([0.0, 448.0, 2.0**-149, torch.finfo(torch.float32).max])
    return torch.cat([random.flatten().float(), *around, (2**exponents).float(), special])


def test_the_scale_is_the_smallest_power_of_two_that_does_not_saturate():
    largest = magnitudes()
    scales = power_of_two_scale(largest)
    assert scales.dtype == torch.float32
    for value, scale in zip(largest.tolist(), scales.tolist(), strict=True):
        assert math.frexp(scale)[0] == 0.5
        if value == 0:
            assert scale == 1
        else:
            assert value / scale <= LARGEST
            assert value / (scale / 2) > LARGEST or scale == 2.0**-100
            assert scale >= 2.0**-100
    assert power_of_two_scale(torch.tensor([0.0, 448.0, 449.0, 7.0, 7.01])).tolist() == [1, 1, 2, 2**-6, 2**-5]
    assert power_of_two_scale(torch.tensor(3.0, dtype=torch.bfloat16)) == 2**-7
    assert power_of_two_scale(torch.tensor([math.inf, math.nan, -math.nan])).isnan().all()


@jit
def _scales_kernel(largest, scales, num: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(largest + index, mask=index < num, other=0.0)
    tl.store(scales + index, scale_of(value), mask=index < num)


@jit
def _encode_kernel(x, codes, num: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(x + index, mask=index < num, other=0.0)
    tl.store(codes + index, value.to(codes.dtype.element_ty), mask=index < num)


def test_the_kernels_scale_is_the_same_bit_for_bit(device):
    largest = torch.cat([magnitudes(), torch.tensor([math.inf, math.nan])]).to(device)
    scales = torch.full_like(largest, -1.0)
    _scales_kernel[(-(-len(largest) // 256),)](largest, scales, num=len(largest), block=256)
    expected = power_of_two_scale(largest)
    assert torch.equal(scales.isnan(), expected.isnan())
    assert torch.equal(scales.nan_to_num(), expected.nan_to_num())


def e4m3_values():
    """Return the 127 values of e4m3 that are not negative, in order."""
    return torch.arange(127, dtype=torch.uint8).view(E4M3).double()


def test_codes_are_rounded_to_nearest_even_and_saturate(device):
    values = e4m3_values()
    middle = ((values[1:] + values[:-1]) / 2).float()
    below, above = torch.nextafter(middle, torch.zeros(())), torch.nextafter(middle, torch.full((), math.inf))
    index = torch.arange(126)
    x = torch.cat([values.float(), below, above, middle])
    expected = torch.cat([torch.arange(127), index, index + 1, index + index % 2])
    x = torch.cat([x, torch.tensor([449.0, 464.0, 465.0, 1e9])]).to(device)
    expected = torch.cat([expected, torch.full((4,), 126)]).to(torch.uint8).to(device)
    for sign in (1, -1):
        codes = torch.zeros(len(x), dtype=E4M3, device=device)
        _encode_kernel[(-(-len(x) // 256),)](sign * x, codes, num=len(x), block=256)
        reference = encode_reference(sign * x.unsqueeze(0), torch.ones(1, device=device))[0]
        for given in (codes, reference):
            bits = given.view(torch.uint8)
            assert torch.equal(bits & 127, expected)
            assert torch.equal(bits >> 7, (torch.signbit(sign * x)).to(torch.uint8))


def test_nan_stays_nan(device):
    x = torch.tensor([[math.nan, -math.nan, 1.0]], device=device)
    codes = torch.zeros(3, dtype=E4M3, device=device)
    _encode_kernel[(1,)](x, codes, num=3, block=4)
    for given in (codes, encode_reference(x, torch.ones(1, device=device))[0]):
        assert given.float().isnan().tolist() == [True, True, False]


def test_each_row_has_its_scale_and_an_error_of_one_rounding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 64), generator=generator).to(torch.bfloat16) * torch.tensor([[1.0], [1e-3], [500], [0], [1e20]])
    scales = power_of_two_scale(x.abs().amax(1))
    values = encode_reference(x, scales).double() * scales.double().unsqueeze(1)
    rounding = (values - x.double()).abs()
    step = torch.maximum(x.double().abs() / 16, scales.double().unsqueeze(1) * 2.0**-10)
    assert (rounding <= step).all()
    assert torch.equal(encode_reference(x, scales[:1])[0], encode_reference(x, scales)[0])


@pytest.mark.parametrize(("capability", "words"), [((8, 6), "8.6"), ((8, 9), None), ((9, 0), None), ((12, 0), None)])
def test_which_devices_have_fp8(monkeypatch, capability, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fp8, "has_triton", True)
    reason = fp8_fallback_reason("cuda:0")
    assert reason is None if words is None else words in reason
    assert "cpu" in fp8_fallback_reason(torch.device("cpu"))
    monkeypatch.setattr(fp8, "has_triton", False)
    if words is None:
        assert "Triton" in fp8_fallback_reason("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in fp8_fallback_reason("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in fp8_fallback_reason("cuda")
