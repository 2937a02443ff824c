"""RMSNorm to FP8 and int8: codes and scales are those of the rounded values, the product of these, what underflows.

In FP8 they are bit for bit; int8's scales but for two roundings to bfloat16, its codes but for the order of sums.
"""

import math

import pytest
import torch

from lsr_scale.kernels import rms_norm_quantize as module
from lsr_scale.kernels.fp8 import E4M3, encode_reference, power_of_two_scale
from lsr_scale.kernels.hadamard import encode_int8_reference, int8_scale, rotate_reference
from lsr_scale.kernels.rms_norm import rms_norm_backward, rms_norm_backward_triton, rms_norm_triton
from lsr_scale.kernels.rms_norm_quantize import (
    rms_norm_quantize,
    rms_norm_quantize_reference,
    rms_norm_quantize_triton,
)
from tests.kernels.checks import OnGpu, assert_close_to_float64, launched, poisoned, strided
from tests.kernels.rms_norm_inputs import EPS, FLOORS, eager, forward64, inputs


def new_codes(shape, device, extra=0, kind=E4M3):
    """Return codes of NaN, or of -128 for int8, with a row stride larger by `extra`, and scales of NaN."""
    poison = 128 if kind == torch.int8 else 127
    codes = torch.full((shape[0], shape[1] + extra), poison, dtype=torch.uint8, device=device).view(kind)
    return codes[:, : shape[1]], poisoned(shape[:1], torch.float32, device)


def same_bits(first, second):
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def assert_quantized(values, codes, scales, counts=None):
    """Fail unless codes and scales are those of the values, and the counts, begun at (5, 7), of what underflows."""
    if codes.dtype == torch.int8:
        return assert_quantized_to_int8(values, codes, scales, counts)
    expected = power_of_two_scale(values.abs().amax(1))
    assert torch.equal(scales, expected)
    assert same_bits(codes, encode_reference(values, expected))
    if counts is not None:
        scaled = values.float().abs() / expected.unsqueeze(1)
        assert counts.tolist() == [5 + int(((scaled > 0) & (scaled < 2**-6)).sum()), 7 + values.numel()]


def assert_quantized_to_int8(values, codes, scales, counts):
    rotated = rotate_reference(values)
    # the row's largest value comes from values rounded before rstd, not after it
    torch.testing.assert_close(scales, int8_scale(rotated.abs().amax(1)), rtol=2**-7, atol=0)
    # sums in another order may round the other way
    steps = codes.int() - encode_int8_reference(rotated, scales).int()
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 1e-3
    if counts is not None:
        # and cancel in one order only
        assert abs(int(counts[0]) - 5 - int(((rotated != 0) & (codes == 0)).sum())) <= 1e-3 * values.numel()
        assert counts[1] == 7 + values.numel()


def downs(num_columns, width, rank, dtype, device):
    down = torch.zeros(num_columns, width, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    down[:rank] = torch.randn((rank, width), generator=generator, dtype=torch.float64).to(dtype) / width**0.5
    return down


def check(
    shape, device, with_residual, with_down, rank=None, num_columns=64, dtype=torch.bfloat16, kind=E4M3, **config
):
    run = config.pop("run", rms_norm_quantize_triton)
    x, weight, residual, *_ = inputs(shape, dtype, device)
    # rows of any size; a value that is larger than the rest of its row, so that some of it underflows; a row of zeros
    x *= 10.0 ** torch.linspace(-2, 2, len(x), device=device)[:, None].to(dtype)
    x[0, 0] = 3000
    residual = residual if with_residual else None
    x[-1] = 0
    if with_residual:
        residual[-1] = 0
    rank = num_columns if rank is None else rank
    down = downs(num_columns, shape[1], rank, dtype, device) if with_down else None
    results = []
    for extra in (24, 0, 0):
        codes, scales = new_codes(shape, device, extra, kind)
        xa, s_out = poisoned((shape[0], num_columns), dtype, device), poisoned(shape, dtype, device)
        counts = torch.tensor([5, 7], device=device)
        rstd = run(
            strided(x, extra),
            weight,
            EPS,
            codes,
            scales,
            down=strided(down, num_columns + extra) if with_down else None,
            xa_out=xa if with_down else None,
            rank=rank if with_down else None,
            residual=strided(residual, 16) if with_residual else None,
            residual_out=s_out if with_residual else None,
            counts=counts,
            **config,
        )
        s64, out64 = forward64(x, weight, residual)
        torch.testing.assert_close(rstd.double(), (s64.square().mean(-1) + EPS).rsqrt(), rtol=1e-5, atol=0)
        values = (s64.float() * weight.float() * rstd.unsqueeze(1)).to(dtype)
        assert_close_to_float64(values, out64, eager(x, weight, residual), FLOORS[dtype])
        assert_quantized(values, codes, scales, counts)
        assert not with_residual or torch.equal(s_out, s64.to(dtype))
        if with_down:
            # of the values as rounded, but not as quantized; rounded once
            exact = values.double() @ down.double().t()
            assert_close_to_float64(xa, exact, exact.to(dtype), 3e-6)
            assert not xa[:, rank:].any()
        results.append((codes.contiguous().view(torch.uint8), scales, rstd, counts, *([xa] if with_down else [])))
    for first, second in zip(*results[1:], strict=True):
        assert torch.equal(first, second)
    return results[0]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank", "config"),
    [
        ((37, 136), 64, 48, {}),
        ((1, 8), 16, 3, {}),
        ((17, 264), 64, 10, dict(rows=16, block=64, block_k=32, sum_stages=2)),
        ((33, 576), 48, None, dict(block_k=256, num_stages=1)),
        ((5, 72), 192, 20, {}),
        ((3, 40), 64, 0, {}),
    ],
)
def test_codes_are_those_of_the_rounded_values_and_the_product_is_of_these(
    shape, num_columns, rank, config, with_residual, device
):
    check(shape, device, with_residual, True, rank, num_columns, **config)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "config"),
    [((7, 896), {}), ((1, 8), {}), ((3, 5120), {}), ((9, 200), dict(rows=4, block=64, block_k=32))],
)
def test_without_adapters(shape, config, with_residual, device):
    check(shape, device, with_residual, False, **config)


# int8 takes widths that are multiples of 64; where programs have room for more columns, the rest is rotated as zeros
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank", "config"),
    [
        ((37, 192), 64, 48, {}),
        ((1, 64), 16, 3, {}),
        ((17, 320), 64, 10, dict(rows=16, block=64, block_k=128, sum_stages=2)),
        ((33, 576), 48, None, dict(block_k=256, num_stages=1)),
        ((5, 896), 128, 20, {}),
    ],
)
def test_int8_codes_are_of_the_rotated_values_and_the_product_is_not(
    shape, num_columns, rank, config, with_residual, device
):
    check(shape, device, with_residual, True, rank, num_columns, kind=torch.int8, **config)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "config"),
    [((7, 896), {}), ((1, 64), {}), ((3, 1536), {}), ((9, 192), dict(rows=8, block=128, block_k=256))],
)
def test_int8_without_adapters(shape, config, with_residual, device):
    check(shape, device, with_residual, False, kind=torch.int8, **config)


# rows that are read in one step, in several, and in a last one that is not full
@pytest.mark.parametrize(
    ("width", "with_down"), [(576, False), (576, True), (2112, True), (5120, False), (8192, False)]
)
def test_int8_codes_hardly_differ_from_those_of_exact_scales(width, with_down, device):
    x, weight, *_ = inputs((9, width), torch.bfloat16, device)
    # channels a hundred times the others, as models have them
    x[:, [3, 70, width - 1]] *= 100
    down = downs(16, width, 16, x.dtype, device) if with_down else None
    results = []
    for run in (rms_norm_quantize_triton, rms_norm_quantize_reference):
        (codes, scales), xa = new_codes(x.shape, device, kind=torch.int8), poisoned((9, 16), x.dtype, device)
        run(x, weight, EPS, codes, scales, down=down, xa_out=xa if with_down else None)
        results.append((codes, scales))
    (codes, scales), (exact_codes, exact_scales) = results
    torch.testing.assert_close(scales, exact_scales, rtol=2**-7, atol=0)
    steps = codes.int() - exact_codes.int()
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 0.1
    # the values themselves: at most half a step, where nothing is clamped
    out = poisoned(x.shape, x.dtype, device)
    rms_norm_triton(x, weight, EPS, out)
    assert ((codes * scales[:, None] - rotate_reference(out)).abs() / scales[:, None]).max() < 1


def test_int8_takes_bfloat16_and_whole_blocks_only(device):
    for width, dtype, message in ((96, torch.bfloat16, "multiples of 64"), (64, torch.float16, "bfloat16")):
        x, weight, *_ = inputs((2, width), dtype, device)
        codes, scales = new_codes(x.shape, device, kind=torch.int8)
        with pytest.raises(AssertionError, match=message):
            rms_norm_quantize_triton(x, weight, EPS, codes, scales)


# all of a block's rotated values are NaN with two that cancel, or with a weight of zero
@pytest.mark.parametrize("with_down", [False, True])
@pytest.mark.parametrize("bad", [[math.inf], [math.nan], [math.inf, -math.inf] * 32])
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_an_int8_row_that_is_not_finite_has_a_scale_of_nan_and_no_other_row_has(bad, gain, with_down, device):
    x, weight, *_ = inputs((20, 192), torch.bfloat16, device)
    x[3, 64 : 64 + len(bad)] = torch.tensor(bad, dtype=x.dtype, device=device)
    weight[64 : 64 + len(bad)] *= gain
    codes, scales = new_codes(x.shape, device, kind=torch.int8)
    xa, down = poisoned((20, 16), x.dtype, device), downs(16, 192, 16, x.dtype, device)
    more = dict(down=down, xa_out=xa) if with_down else {}
    rms_norm_quantize_triton(x, weight, EPS, codes, scales, **more)
    assert scales.isnan().nonzero().tolist() == [[3]]
    assert not with_down or xa.isnan().any(1).nonzero().tolist() == [[3]]


def test_in_float16(device):
    check((19, 264), device, True, True, dtype=torch.float16)


@pytest.mark.parametrize("alias", [0, 1])
def test_the_sum_may_replace_a_summand(alias, device):
    x, weight, residual, *_ = inputs((35, 72), torch.bfloat16, device)
    results = []
    for in_place in (False, True):
        pair = [x.clone(), residual.clone()]
        s = pair[alias] if in_place else poisoned(x.shape, x.dtype, device)
        codes, scales = new_codes(x.shape, device)
        rms_norm_quantize_triton(
            pair[0], weight, EPS, codes, scales, residual=pair[1], residual_out=s, block=32, block_k=32
        )
        results.append((codes.view(torch.uint8), scales, s))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_codes_hardly_ever_differ_from_those_of_the_norm_itself(device):
    x, weight, *_ = inputs((64, 1536), torch.bfloat16, device)
    out = poisoned(x.shape, x.dtype, device)
    rms_norm_triton(x, weight, EPS, out)
    codes, scales = new_codes(x.shape, device)
    rms_norm_quantize_triton(x, weight, EPS, codes, scales)
    expected = encode_reference(out, power_of_two_scale(out.abs().amax(1)))
    assert torch.equal(scales, power_of_two_scale(out.abs().amax(1)))
    steps = codes.view(torch.uint8).int() - expected.view(torch.uint8).int()
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 1e-3


@pytest.mark.parametrize("with_down", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(bad, with_down, device):
    x, weight, *_ = inputs((20, 72), torch.bfloat16, device)
    x[3, 70] = bad
    codes, scales = new_codes(x.shape, device)
    xa, down = poisoned((20, 16), x.dtype, device), downs(16, 72, 16, x.dtype, device)
    more = dict(down=down, xa_out=xa) if with_down else {}
    rms_norm_quantize_triton(x, weight, EPS, codes, scales, **more)
    values = codes.float() * scales.unsqueeze(1)
    assert values[3].isnan().all()
    others = torch.arange(20, device=device) != 3
    assert values[others].isfinite().all()
    assert not with_down or (xa.isfinite().all(1) == others).all()


@pytest.mark.parametrize("kind", [E4M3, torch.int8])
@pytest.mark.parametrize("with_residual", [False, True])
def test_more_columns_than_the_kernel_has(with_residual, kind, monkeypatch, device):
    """Other kernels do it: codes are those of `rms_norm`'s own values."""
    monkeypatch.setattr(module, "use_triton", lambda _: True)
    width = 192 if kind == torch.int8 else 200
    x, weight, residual, *_ = inputs((10, width), torch.bfloat16, device)
    sums = dict(residual=residual, residual_out=torch.empty_like(x)) if with_residual else {}
    down, xa = downs(192, width, 192, x.dtype, device), poisoned((10, 192), x.dtype, device)
    (codes, scales), out = new_codes(x.shape, device, 24, kind), torch.empty_like(x)
    counts = torch.tensor([5, 7], device=device)
    rstd = rms_norm_quantize(x, weight, EPS, codes, scales, down=down, xa_out=xa, counts=counts, **sums)
    assert torch.equal(rms_norm_triton(x, weight, EPS, out, **sums), rstd)
    assert_quantized(out, codes, scales, counts)
    exact = out.double() @ down.double().t()
    assert_close_to_float64(xa, exact, exact.to(xa.dtype), 1e-3)


@pytest.mark.parametrize(("kind", "width"), [(E4M3, 72), (torch.int8, 128)])
def test_without_a_gpu_the_reference_runs(kind, width):
    for with_down in (False, True):
        for with_residual in (False, True):
            arguments = (7, width), "cpu", with_residual, with_down, 20, 48
            found = check(*arguments, kind=kind, run=rms_norm_quantize)
            reference = check(*arguments, kind=kind, run=rms_norm_quantize_reference)
            assert all(torch.equal(first, second) for first, second in zip(found, reference, strict=True))


def backward(shape, device, with_residual, run, dtype=torch.bfloat16, **config):
    x, weight, _, grad, residual_grad = inputs(shape, dtype, device)
    grad *= 10.0 ** torch.linspace(-12, 1, len(x), device=device)[:, None].to(dtype)
    residual_grad = (residual_grad * grad.abs().amax(1, keepdim=True)) if with_residual else None
    # a large value, beside which three underflow that its projection does not reach, and a row of zeros
    grad[0, 0] = 3000
    x[0, 1:4] = 0
    grad[-1] = 0
    if with_residual:
        residual_grad[0] = grad[0]
        residual_grad[-1] = 0
    rstd = (x.float().square().mean(-1) + EPS).rsqrt()
    expected, out = (poisoned(shape, dtype, device) for _ in range(2))
    run(grad, x, weight, rstd, expected, residual_grad=residual_grad, **config)
    codes, scales = new_codes(shape, device, 24)
    counts = torch.tensor([5, 7], device=device)
    # in place, as it is used
    out = grad if residual_grad is None else residual_grad
    run(grad, x, weight, rstd, out, residual_grad=residual_grad, codes=codes, scales=scales, counts=counts, **config)
    assert torch.equal(out, expected)
    assert_quantized(out, codes, scales, counts)
    # the first row has a large value: with few rows no other is as small
    assert len(x) <= 3 or scales.min() < 1e-9
    assert scales[-1] == 1
    assert counts[0] > 5


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "config"),
    [((33, 200), {}), ((5, 1536), {}), ((7, 4096), {}), ((5, 200), dict(block=64)), ((9, 72), dict(rows=4))],
)
def test_the_input_gradient_has_codes_too(shape, config, with_residual, device):
    backward(shape, device, with_residual, rms_norm_backward_triton, **config)


def test_without_a_gpu_the_backward_reference_runs():
    backward((7, 72), "cpu", True, rms_norm_backward)


def test_codes_without_counts_and_of_a_gradient_that_is_not_finite(device):
    x, weight, _, grad, _ = inputs((5, 72), torch.bfloat16, device)
    residual_grad = torch.zeros_like(grad)
    # one through the norm, and so in the whole row; one past it
    grad[2, 5] = math.inf
    residual_grad[4, 7] = math.nan
    codes, scales = new_codes(x.shape, device)
    rstd = (x.float().square().mean(-1) + EPS).rsqrt()
    rms_norm_backward_triton(grad, x, weight, rstd, grad, residual_grad=residual_grad, codes=codes, scales=scales)
    nan = codes.float().isnan()
    assert nan.all(1).tolist() == nan.any(1).tolist() == scales.isnan().tolist() == [False, False, True, False, True]


# of a Mistral layer and of a small model; tiles depend on the width, not on the GPU
ONE_WIDTH, WIDTHS = (4096,), (576, 4096)


def launches(tokens, columns, rank, back, kind, widths):
    """Launch a kernel with all that it may be given and, of several widths, with nothing."""
    empty = OnGpu.empty
    for width in widths:
        x, weight, scales = empty(tokens, width), empty(width), empty(tokens, dtype=torch.float32)
        codes, counts = empty(tokens, width, dtype=kind), empty(2, dtype=torch.int64)
        if back:
            rms_norm_backward(x, x, weight, scales, x, residual_grad=x, codes=codes, scales=scales, counts=counts)
            if len(widths) > 1:
                rms_norm_backward(x, x, weight, scales, x, codes=codes, scales=scales)
            continue
        adapters = dict(down=empty(columns, width), xa_out=empty(tokens, columns), rank=rank) if columns else {}
        rms_norm_quantize(x, weight, EPS, codes, scales, residual=x, residual_out=x, counts=counts, **adapters)
        if len(widths) > 1:
            rms_norm_quantize(x, weight, EPS, codes, scales, **adapters)


@pytest.mark.parametrize(
    ("tokens", "columns", "rank", "kind", "back", "widths", "capabilities"),
    [
        # Triton makes a constant of an argument that is 1
        (1, 64, 48, E4M3, False, ONE_WIDTH, (90,)),
        (64, 64, 48, E4M3, False, WIDTHS, (89,)),
        (64, 64, 48, E4M3, False, ONE_WIDTH, (90, 100, 120)),
        # without adapters, and with as many as the kernel takes
        (64, 0, None, E4M3, False, WIDTHS, (90,)),
        (64, 128, None, E4M3, False, ONE_WIDTH, (89,)),
        (64, 0, None, E4M3, True, WIDTHS, (89,)),
        (64, 0, None, E4M3, True, ONE_WIDTH, (90, 100, 120)),
        (64, 0, None, torch.int8, False, WIDTHS, (90,)),
        (64, 64, 48, torch.int8, False, WIDTHS, (89,)),
        (64, 64, 48, torch.int8, False, ONE_WIDTH, (80, 86, 90, 100, 120)),
        (64, 128, None, torch.int8, False, ONE_WIDTH, (89,)),
    ],
)
def test_kernels_compile_for_all_gpus_and_fit(tokens, columns, rank, kind, back, widths, capabilities):
    more = dict(shared_bytes=99 * 1024, capabilities=capabilities)
    found = launched(launches, tokens, columns, rank, back, kind, widths, **more)
    kernel = "_rms_norm_backward_kernel" if back else "_rms_norm_quantize_kernel"
    assert {(name, capability) for name, capability, _ in found} == {(kernel, n) for n in capabilities}
    assert max(used for *_, used in found) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank"),
    [
        ((2, 4096), 64, 48),
        ((1001, 576), 64, 32),
        ((513, 4096), 128, None),
        ((1000, 5120), 64, 16),
        ((64, 8192), 64, 16),
        ((100, 896), 48, 48),
    ],
)
def test_on_the_gpu(shape, num_columns, rank, with_residual):
    for kind in (E4M3, torch.int8):
        check(shape, "cuda", with_residual, True, rank, num_columns, kind=kind)
        check(shape, "cuda", with_residual, False, kind=kind)
    backward(shape, "cuda", with_residual, rms_norm_backward_triton)
