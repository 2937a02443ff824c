"""The GEMM of 8-bit codes: its kernel, interpreted, against the reference; that against float64; what it refuses."""

import pytest
import torch

from lsr_scale.kernels.fp8 import E4M3
from lsr_scale.kernels.gemm_8bit import gemm_8bit, gemm_8bit_reference, gemm_8bit_triton
from tests.kernels.checks import error, poisoned

# tiles that do not divide anything below, and small enough for the interpreter
TILES = dict(block_m=16, block_n=32, block_k=32, group=2)


def operands(rows=37, depth=80, columns=48, rank=16):
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    thin, up = new(rows, rank).bfloat16(), new(columns, rank).bfloat16()
    return {
        "codes": (50 * new(rows, depth)).to(E4M3),
        "scales": 2.0 ** torch.randint(-8, 8, (rows,), generator=generator),
        "weight": (50 * new(columns, depth)).to(E4M3),
        "weight_scale": torch.tensor([2.0**-9]),
    }, {"thin": thin, "up": up, "down": up.t().contiguous(), "bias": new(columns).bfloat16()}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("other", [None, "up", "down"])
@pytest.mark.parametrize("rank", [16, 48, 64, 128])
def test_kernel_against_reference(other, with_bias, rank):
    pytest.importorskip("triton")
    base, extra = operands(rank=rank)
    given = {} if other is None else {"thin": extra["thin"], other: extra[other]}
    given |= {"bias": extra["bias"]} if with_bias else {}
    expected, found = (poisoned((37, 48), torch.float32) for _ in range(2))
    gemm_8bit_reference(*base.values(), expected, **given)
    gemm_8bit_triton(*base.values(), found, **given, **TILES)
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("other", [None, "up", "down"])
def test_int8_codes_and_a_scale_for_each_row_of_the_weight(other):
    pytest.importorskip("triton")
    base, extra = operands(depth=1600)
    for name in ("codes", "weight"):
        base[name] = base[name].float().clamp(-127, 127).to(torch.int8)
    base["codes"][0], base["weight"][1] = 127, 127
    base["weight_scale"] = torch.rand(48)
    given = {} if other is None else {"thin": extra["thin"], other: extra[other]}
    expected, found = (poisoned((37, 48), torch.float32) for _ in range(2))
    gemm_8bit_reference(*base.values(), expected, **given)
    gemm_8bit_triton(*base.values(), found, **given, **TILES)
    assert error(found, expected) < 1e-6
    if other is None:
        assert expected[0, 1] == 127 * 127 * 1600 * base["scales"][0] * base["weight_scale"][1]


def test_tiles_of_two_parts():
    pytest.importorskip("triton")
    base, _ = operands(rows=20, columns=288)
    expected, found = (poisoned((20, 288), torch.float32) for _ in range(2))
    gemm_8bit_reference(*base.values(), expected)
    gemm_8bit_triton(*base.values(), found, **{**TILES, "block_n": 256})
    assert error(found, expected) < 1e-6


def test_reference_against_float64():
    base, extra = operands()
    out = poisoned((37, 48), torch.bfloat16)
    gemm_8bit(*base.values(), out, thin=extra["thin"], up=extra["up"], bias=extra["bias"])
    rows = base["codes"].double() * base["scales"].double()[:, None]
    exact = rows @ (base["weight"].double() * 2.0**-9).t() + extra["thin"].double() @ extra["up"].double().t()
    assert error(out, exact + extra["bias"].double()) < 3e-3  # one rounding to bfloat16


def test_codes_that_are_not_numbers_make_their_row_so():
    base, _ = operands()
    base["codes"][3, 5] = float("nan")
    out = poisoned((37, 48), torch.bfloat16)
    out.zero_()
    gemm_8bit(*base.values(), out)
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(48, 64, dtype=E4M3)}, "shapes do not fit"),
        ({"scales": torch.ones(37, dtype=torch.float64)}, "float32 scales"),
        ({"weight_scale": torch.ones(37)}, "shapes do not fit"),
        ({"codes": torch.zeros(37, 80, dtype=torch.float8_e5m2)}, "both in e4m3"),
        ({"codes": torch.zeros(37, 80, dtype=torch.int8)}, "got int8, float8_e4m3fn"),
        ({"codes": torch.zeros(37, 88, dtype=E4M3)[:, :80]}, "multiples of 16 bytes"),
        ({"thin": torch.zeros(37, 16, dtype=torch.bfloat16)}, "exactly if"),
        ({"thin": torch.zeros(37, 8, dtype=torch.bfloat16), "up": torch.zeros(48, 8, dtype=torch.bfloat16)}, "R % 16"),
        ({"bias": torch.zeros(47)}, "bias"),
    ],
)
def test_refused(change, words):
    base, _ = operands()
    with pytest.raises(ValueError, match=words):
        gemm_8bit_triton(**{**base, "out": poisoned((37, 48), torch.bfloat16), **change})
