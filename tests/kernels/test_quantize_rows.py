"""Rows in e4m3 and, rotated, in int8, the count of what underflows, and the product of the rows, against torch."""

import math

import pytest
import torch

from lsr_scale.kernels.fp8 import E4M3
from lsr_scale.kernels.hadamard import rotate_reference
from lsr_scale.kernels.quantize_rows import quantize_rows, quantize_rows_reference, quantize_rows_triton
from tests.kernels.checks import assert_close_to_float64, error, strided


def rows_of(shape, device, dtype=torch.bfloat16, seed=0):
    """Return rows of very different magnitudes, some of whose values underflow, and some of which are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp(2 * torch.randn(shape, generator=generator, dtype=torch.float64))
    x = x * 2.0 ** torch.randint(-6, 4, (shape[0], 1), generator=generator)
    x[1::4] *= 1e-3
    x[torch.rand(shape, generator=generator) < 0.02] = 0
    return x.to(dtype).to(device)


def exact_rows_of(shape, device, dtype=torch.bfloat16, seed=0):
    """Return rows whose rotation is exact in float32 in any order of its sums: integers times a power of two.

    One channel is far larger than the others, so that some rotated values underflow; some rows are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-32, 33, shape, generator=generator).double()
    x[:, 5] = torch.randint(-32, 33, shape[:1], generator=generator) * 64.0
    x = x * 2.0 ** torch.randint(-6, 4, (shape[0], 1), generator=generator)
    x[1::4] *= 2.0**-10
    x[3::7] = 0
    return x.to(dtype).to(device)


def outputs(shape, device, extra=0, format=E4M3):
    """Return codes of any row stride, scales and counts that hold something already."""
    wide = torch.full((shape[0], shape[1] + extra), 0x7F, dtype=torch.uint8, device=device).view(format)
    scales = torch.full((shape[0],), math.nan, device=device)
    return wide[:, : shape[1]], scales, torch.tensor([5, 7], device=device)


def stacked(num_columns, width, rank, device, dtype=torch.bfloat16):
    """Return projections, of which only the first `rank` are not zero."""
    generator = torch.Generator().manual_seed(1)
    rank = num_columns if rank is None else rank
    projection = torch.zeros(num_columns, width, dtype=dtype, device=device)
    projection[:rank] = torch.randn((rank, width), generator=generator, dtype=torch.float64).to(dtype) / width**0.5
    return projection


def bits(codes):
    return codes.contiguous().view(torch.uint8)


def check(
    shape,
    device,
    *,
    format=E4M3,
    num_columns=0,
    rank=None,
    run=quantize_rows_triton,
    dtype=torch.bfloat16,
    **config,
):
    x = (rows_of if format == E4M3 else exact_rows_of)(shape, device, dtype)
    codes, scales, counts = outputs(shape, device, format=format)
    quantize_rows_reference(x, codes, scales, counts=counts)
    results = []
    # another row stride may be another program, with another order of sums; the same one must repeat itself bit by bit
    for extra in (16, 5, 5):
        given, given_scales, given_counts = outputs(shape, device, extra, format)
        arguments = {} if extra == 16 else {"counts": given_counts}
        if num_columns:
            projection = strided(stacked(num_columns, shape[1], rank, device, dtype), extra)
            product = strided(torch.full((shape[0], num_columns), math.nan, dtype=dtype, device=device), extra)
            arguments |= {"projection": projection, "product": product, "rank": rank}
        run(strided(x, extra), given, given_scales, **arguments, **config)
        assert torch.equal(bits(given), bits(codes))
        assert torch.equal(given_scales, scales)
        assert torch.equal(given_counts, counts) or "counts" not in arguments
        results.append(product if num_columns else given_scales)
    assert torch.equal(results[1], results[2])
    # some underflow, most do not
    assert counts[0] > 5 or x.numel() < 100
    assert counts[0] < 5 + x.numel() / 2
    assert counts[1] == 7 + x.numel()
    if num_columns:
        exact = x.double() @ projection.double().t()
        for product in results:
            assert_close_to_float64(product, exact, exact.to(dtype), 3e-6)
            assert rank is None or not product[:, rank:].any()


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((37, 144), {}),
        ((1, 16), {}),
        ((13, 576), {}),
        ((5, 4864), {}),
        ((9, 80), dict(quantize_rows=4)),
        # rows that are longer than what is read at once
        ((7, 208), dict(block=64, quantize_rows=2)),
        ((3, 192), dict(block=64)),
    ],
)
def test_rows_are_quantized_as_by_the_reference(shape, config, device):
    check(shape, device, **config)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((37, 128), {}),
        ((1, 64), {}),
        ((13, 576), {}),
        ((5, 896), {}),
        ((5, 4096), {}),
        ((3, 4864), {}),
        ((3, 6144), {}),
        # rows that are longer than what is read at once
        ((3, 14336), {}),
        ((2, 28672), {}),
        ((7, 448), dict(block=64, quantize_rows=16)),
        ((9, 1728), dict(block=512, quantize_rows=2)),
    ],
)
def test_rows_are_rotated_and_quantized_as_by_the_reference(shape, config, device):
    check(shape, device, format=torch.int8, **config)


@pytest.mark.parametrize(
    ("shape", "num_columns", "rank", "config", "dtype"),
    [
        ((37, 192), 64, 48, {}, torch.bfloat16),
        ((65, 320), 64, 10, dict(rows=16, block_k=32, splits=3), torch.float16),
        ((33, 256), 48, None, dict(block=64, quantize_rows=16, splits=2, block_k=64), torch.bfloat16),
        ((3, 4608), 16, 16, {}, torch.bfloat16),
    ],
)
def test_the_product_beside_int8_is_of_rows_that_are_not_rotated(shape, num_columns, rank, config, dtype, device):
    check(shape, device, format=torch.int8, num_columns=num_columns, rank=rank, dtype=dtype, **config)


def check_int8(shape, device, run, **config):
    """Codes of any rows are within half a step of the rotated values, and the largest has the largest code."""
    x = rows_of(shape, device)
    codes, scales, _ = outputs(shape, device, format=torch.int8)
    run(x, codes, scales, **config)
    rotated = rotate_reference(x.double())
    largest = rotated.abs().amax(1)
    expected = torch.where(largest == 0, 1.0, largest / 127)
    torch.testing.assert_close(scales.double(), expected, rtol=1e-5, atol=0)
    steps = (codes.double() - rotated / expected[:, None]).abs()
    assert steps.max() <= 0.501
    assert codes.abs().amax(1).tolist() == [0 if zero else 127 for zero in largest == 0]


@pytest.mark.parametrize("config", [{}, dict(block=64, quantize_rows=16)])
def test_int8_codes_are_the_nearest(config, device):
    check_int8((21, 576), device, quantize_rows_triton, **config)
    check_int8((21, 576), device, quantize_rows_reference)


def test_int8_wants_whole_blocks(device):
    x = rows_of((4, 96), device)
    codes, scales, _ = outputs(x.shape, device, format=torch.int8)
    with pytest.raises(AssertionError, match="multiples of 64"):
        quantize_rows_triton(x, codes, scales)


@pytest.mark.parametrize("config", [{}, dict(block=64)])
@pytest.mark.parametrize("bad", [[math.inf], [-math.inf], [math.nan], [math.inf, -math.inf]])
def test_a_row_that_is_not_finite_has_no_scale_in_int8_and_no_other_row_has_not(bad, config, device):
    """Of both infinities in a block, the rotation makes NaN only."""
    x = exact_rows_of((6, 192), device)
    x[2, 70 : 70 + len(bad)] = torch.tensor(bad, dtype=x.dtype, device=device)
    for run in (quantize_rows_reference, quantize_rows_triton):
        codes, scales, counts = outputs(x.shape, device, format=torch.int8)
        run(x, codes, scales, counts=counts, **(config if run is quantize_rows_triton else {}))
        others = torch.arange(6, device=device) != 2
        assert scales.isnan().tolist() == (~others).tolist()
        one, one_scales, one_counts = outputs((5, 192), device, format=torch.int8)
        run(x[others], one, one_scales, counts=one_counts)
        assert torch.equal(codes[others], one)
        assert torch.equal(scales[others], one_scales)
        assert counts.tolist() == [one_counts[0], one_counts[1] + 192]


@pytest.mark.parametrize(
    ("shape", "num_columns", "rank", "config", "dtype"),
    [
        ((37, 144), 64, 48, {}, torch.float16),
        ((1, 16), 16, 3, {}, torch.bfloat16),
        ((65, 272), 64, 10, dict(rows=16, block_k=32, splits=3), torch.bfloat16),
        ((33, 208), 48, None, dict(block=64, quantize_rows=4, splits=2, block_k=64), torch.float16),
        ((70, 80), 128, None, dict(rows=64, num_stages=1), torch.bfloat16),
        ((3, 48), 64, 0, {}, torch.bfloat16),
        ((3, 4608), 16, 16, {}, torch.bfloat16),
    ],
)
def test_the_product_is_of_the_rows_themselves(shape, num_columns, rank, config, dtype, device):
    check(shape, device, num_columns=num_columns, rank=rank, dtype=dtype, **config)


@pytest.mark.parametrize("config", [{}, dict(block=16)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(value, config, device):
    x = rows_of((6, 48), device)
    x[2, 29] = value
    for run in (quantize_rows_reference, quantize_rows_triton):
        codes, scales, counts = outputs(x.shape, device)
        run(x, codes, scales, counts=counts, **(config if run is quantize_rows_triton else {}))
        values = codes.float() * scales.unsqueeze(1)
        others = torch.arange(6, device=device) != 2
        assert values[2].isnan().all()
        assert scales[2].isnan()
        assert values[others].isfinite().all()
        assert error(values[others], x[others]) < 0.05
        one, one_scales, one_counts = outputs((5, 48), device)
        run(x[others], one, one_scales, counts=one_counts)
        assert torch.equal(bits(codes[others]), bits(one))
        assert counts.tolist() == [one_counts[0], one_counts[1] + 48]


@pytest.mark.parametrize("run", [quantize_rows_reference, quantize_rows_triton])
def test_what_int8_counts_as_underflow(run, device):
    """Every value of a rotated block with one value is an eighth of it; half a step still rounds to zero."""
    x = torch.zeros((3, 192))
    x[:2, 0] = 8 * 127.0
    x[0, 64], x[0, 128] = 4.0, -2.0
    x[1, 64], x[1, 128] = -4.0625, 0.0
    x = x.to(torch.bfloat16).to(device)
    codes, scales, counts = outputs(x.shape, device, format=torch.int8)
    run(x, codes, scales, counts=counts)
    assert scales.tolist() == [1, 1, 1]
    assert counts.tolist() == [5 + 128, 7 + 3 * 192]
    assert not codes[0, 64:].any()
    assert (codes[1, 64:128].abs() == 1).all()


@pytest.mark.parametrize("run", [quantize_rows_reference, quantize_rows_triton])
def test_what_counts_as_underflow(run, device):
    """448 has a scale of 1: below 2^-6 a value underflows, but not zero; the next larger scale doubles the bound."""
    values = [2.0**-6, -(2.0**-6) * (1 - 2.0**-8), 2.0**-7, -(2.0**-40), 0.0, -0.0, 1.0]
    x = torch.zeros((3, 16))
    x[0, :8] = torch.tensor([448.0, *values])
    x[1, :8] = torch.tensor([-450.0, *values])
    x = x.to(torch.bfloat16).to(device)
    codes, scales, counts = outputs(x.shape, device)
    run(x, codes, scales, counts=counts)
    assert scales.tolist() == [1, 2, 1]
    assert counts.tolist() == [5 + 3 + 4, 7 + 48]
    assert not bits(codes[2]).any()


def test_no_gpu_no_kernel(device):
    """On the CPU the operation is its reference; with fake tensors it does nothing."""
    check((7, 80), device, num_columns=48, rank=20, run=quantize_rows)
    check((7, 128), device, format=torch.int8, num_columns=48, rank=20, run=quantize_rows)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, codes = torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(4, 16, dtype=E4M3)
        quantize_rows(x, codes, torch.empty(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank"),
    [
        ((1, 4096), 64, 48),
        ((1000, 3584), 64, 32),
        ((513, 4096), 128, None),
        ((64, 14336), 64, 16),
        ((100, 28672), 64, 48),
        ((100, 57344), 48, 48),
        ((33, 896), 192, None),
        ((333, 576), 0, None),
        ((333, 6144), 0, None),
        ((77, 28672), 0, None),
    ],
)
def test_quantization_on_the_gpu(shape, num_columns, rank):
    check(shape, "cuda", num_columns=num_columns, rank=rank, run=quantize_rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank"),
    [
        ((1, 4096), 64, 48),
        ((513, 4096), 128, None),
        ((65, 6144), 64, 16),
        ((64, 14336), 64, 16),
        ((101, 28672), 64, 48),
        ((333, 576), 0, None),
        ((77, 64), 0, None),
        ((333, 896), 0, None),
        ((333, 4096), 0, None),
        ((333, 4864), 0, None),
        ((333, 6144), 0, None),
        ((77, 14336), 0, None),
        ((77, 28672), 0, None),
    ],
)
def test_quantization_to_int8_on_the_gpu(shape, num_columns, rank):
    check(shape, "cuda", format=torch.int8, num_columns=num_columns, rank=rank, run=quantize_rows)
    if not num_columns:
        check_int8(shape, "cuda", quantize_rows)
