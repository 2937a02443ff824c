"""Sums of Kronecker products of many adapters' factors against float64."""

from typing import Any

import pytest
import torch

from lsr_scale.kernels.kron_sum import kron_sum, kron_sum_reference, kron_sum_triton
from tests.kernels.checks import OnGpu, assert_close_to_float64, launched, poisoned

# (capacity, modules, terms), (M, N), (m, n): both sides of a pair, sizes that are no powers of two, many terms
SHAPES: list[Any] = [
    ((3, 2, 2), (2, 12), (2, 4)),
    ((4, 1, 16), (4, 33), (4, 31)),
    ((2, 3, 5), (40, 2), (3, 2)),
    ((2, 1, 40), (17, 4), (60, 4)),
]


def factors(sizes, left, right, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*sizes, *shape, generator=generator).to(device, dtype) for shape in (left, right)]


def expected(left, right, slots, scale):
    rows = [
        [
            scale[b, j].double() * sum(map(torch.kron, left[slot, j].double(), right[slot, j].double()))
            for j in range(left.shape[1])
        ]
        for b, slot in enumerate(slots.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("run", [kron_sum_triton, kron_sum_reference])
@pytest.mark.parametrize(("sizes", "left", "right"), SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_against_float64(sizes, left, right, dtypes, run, device):
    if run is kron_sum_triton:
        pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    stored, made = (getattr(torch, name) for name in dtypes)
    a, b = factors(sizes, left, right, stored, device)
    slots = torch.tensor([sizes[0] - 1, 0, sizes[0] - 1], device=device)
    scale = torch.tensor([2.0, 0.0, -0.5], device=device)[:, None].repeat(1, sizes[1])
    shape = (3, sizes[1], left[0] * right[0], left[1] * right[1])
    out = run(a, b, slots, scale, poisoned(shape, made, device))
    exact = expected(a, b, slots, scale)
    floor = 1e-6 if made == torch.float32 else 4e-3
    assert_close_to_float64(out, exact, exact.to(made), floor)
    assert not out[1].any()
    ones = run(a, b, slots, None, poisoned(shape, made, device))
    torch.testing.assert_close(ones[0] * 2, out[0])


def test_float64_is_exact_and_shapes_are_checked():
    a, b = factors(*SHAPES[0], dtype=torch.float64, device="cpu")
    slots, scale = torch.tensor([1]), torch.ones(1, 2, dtype=torch.float64)
    out = kron_sum(a, b, slots, scale, poisoned((1, 2, 4, 48), torch.float64))
    torch.testing.assert_close(out, expected(a, b, slots, scale), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected"):
        kron_sum(a, b, slots, scale, out[:, :, 1:])
    with pytest.raises(ValueError, match="int64"):
        kron_sum(a, b, slots.int(), scale, out)
    with pytest.raises(ValueError, match="contiguous"):
        kron_sum(a.mT, b, slots, scale, poisoned((1, 2, 24, 8), torch.float64))


def llama():
    """Make both sides of LLaMA-3.2-1B's widest linears, r = s = 16, of 64 rows."""
    empty = OnGpu.empty
    slots, scale = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 16)
    for left, right in (((4, 128), (4, 64)), ((128, 4), (64, 4))):
        a, b = (empty(1000, 16, 16, *shape, dtype=torch.float32) for shape in (left, right))
        kron_sum(a, b, slots, scale, empty(64, 16, left[0] * right[0], left[1] * right[1]))


def test_it_fits_into_every_gpu():
    launches = launched(llama, shared_bytes=99 * 1024, capabilities=(80, 86, 90, 100, 120))
    assert {capability for _, capability, _ in launches} == {80, 86, 90, 100, 120}
    assert max(used for _, _, used in launches) <= 99 * 1024
