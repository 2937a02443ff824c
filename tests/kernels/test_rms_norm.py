"""RMSNorm both ways against float64: in place, per head, rows too long for one block."""

import pytest
import torch

from lsr_scale.kernels import rms_norm as module
from lsr_scale.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_backward_triton,
    rms_norm_reference,
    rms_norm_triton,
)
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned, strided
from tests.kernels.rms_norm_inputs import EPS, FLOORS, eager, forward64, inputs


def check(shape, dtype, device, with_residual, **config):
    x, weight, residual, grad, residual_grad = inputs(shape, dtype, device)
    residual, residual_grad = (residual, residual_grad) if with_residual else (None, None)
    three = len(shape) == 3

    def view(tensor, extra):
        if tensor is None:
            return None
        return strided(tensor.flatten(1), extra).unflatten(1, shape[1:]) if three else strided(tensor, extra)

    out, s_out = (view(poisoned(shape, dtype, device), extra) for extra in (64, 8))
    rstd = rms_norm_triton(
        view(x, 8),
        weight,
        EPS,
        out,
        residual=view(residual, 16),
        residual_out=s_out if with_residual else None,
        **config,
    )
    s64, out64 = forward64(x, weight, residual)
    assert_close_to_float64(out, out64, eager(x, weight, residual), FLOORS[dtype])
    # the interpreter truncates to bf16 where the GPU rounds to nearest
    exact = dtype != torch.bfloat16 or device == "cuda"
    torch.testing.assert_close(
        rstd.double(), (s64.square().mean(-1) + EPS).rsqrt(), rtol=1e-5 if exact else 8e-3, atol=0
    )
    if with_residual and exact:
        assert torch.equal(s_out, s64.to(dtype))
    elif with_residual:
        assert_close_to_float64(s_out, s64, s64.to(dtype), 4e-3)

    leaf = s64.detach().requires_grad_()
    forward64(leaf, weight)[1].backward(grad.double())
    expected = leaf.grad if residual_grad is None else leaf.grad + residual_grad.double()
    leaf = s64.to(dtype).requires_grad_()
    eager(leaf, weight).backward(grad)
    plain = leaf.grad if residual_grad is None else leaf.grad + residual_grad
    actual = view(poisoned(shape, dtype, device), 8)
    rms_norm_backward_triton(
        view(grad, 16), view(s64.to(dtype), 8), weight, rstd, actual, residual_grad=view(residual_grad, 24), **config
    )
    assert_close_to_float64(actual, expected, plain, FLOORS[dtype])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 48), (33, 200), (5, 1536), (7, 3, 64), (5, 2, 24), (1, 1, 128)])
def test_both_directions_agree_with_float64_on_strided_views(shape, dtype, with_residual, device):
    check(shape, dtype, device, with_residual)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_longer_than_a_block_is_read_in_several(rows, with_residual, device):
    check((3, 200), torch.float16, device, with_residual, block=64, rows=rows)


def test_the_largest_single_block_and_the_row_just_beyond_it(device):
    for width in (8192, 8200):
        check((1, width), torch.float16, device, True)


@pytest.mark.parametrize("block", [None, 64])
def test_an_output_may_be_an_input(block, device):
    x, weight, residual, grad, residual_grad = inputs((5, 136), torch.float16, device)
    s, out = poisoned(x.shape, x.dtype, device), poisoned(x.shape, x.dtype, device)
    rstd = rms_norm_triton(x, weight, EPS, out, residual=residual, residual_out=s, block=block)
    for alias in (0, 1):
        pair = [x.clone(), residual.clone()]
        actual = poisoned(x.shape, x.dtype, device)
        rms_norm_triton(pair[0], weight, EPS, actual, residual=pair[1], residual_out=pair[alias], block=block)
        assert torch.equal(actual, out)
        assert torch.equal(pair[alias], s)
        pair = [x.clone(), residual.clone()]
        rms_norm_triton(pair[0], weight, EPS, pair[alias], residual=pair[1], residual_out=actual, block=block)
        assert torch.equal(pair[alias], out)
    backward = poisoned(x.shape, x.dtype, device)
    rms_norm_backward_triton(grad, s, weight, rstd, backward, residual_grad=residual_grad, block=block)
    for alias in range(3):
        three = [grad.clone(), s.clone(), residual_grad.clone()]
        rms_norm_backward_triton(three[0], three[1], weight, rstd, three[alias], residual_grad=three[2], block=block)
        assert torch.equal(three[alias], backward)


def test_the_reference_is_float64_exact_and_is_what_runs_without_a_gpu():
    x, weight, residual, grad, residual_grad = inputs((6, 40), torch.float64)
    out, s = torch.empty_like(x), torch.empty_like(x)
    rstd = rms_norm(x, weight, EPS, out, residual=residual, residual_out=s)
    leaf = (x + residual).requires_grad_()
    expected = torch.nn.functional.rms_norm(leaf, (40,), weight, EPS)
    expected.backward(grad)
    assert error(out, expected.detach()) < 1e-14
    actual = torch.empty_like(x)
    rms_norm_backward(grad, s, weight, rstd, actual, residual_grad=residual_grad)
    assert error(actual, leaf.grad + residual_grad) < 1e-14
    again = torch.empty_like(x)
    assert torch.equal(rms_norm_reference(s, weight, EPS, again), rstd)
    assert torch.equal(again, out)
    rms_norm_backward_reference(grad, s, weight, rstd, again)
    assert error(again, leaf.grad) < 1e-14


@pytest.mark.parametrize(
    ("rows", "block", "single", "heads"), [(1, 4096, True, 1), (16, 128, True, 40), (1, 8192, False, 1)]
)
def test_kernels_compile_for_sm80_and_sm90(rows, block, single, heads):
    def strides(*tensors):
        return [f"{name}_{dimension}_stride" for name in tensors for dimension in ("row", "head")]

    forward = {
        **dict.fromkeys(["x", "residual", "weight", "out", "residual_out"], "*bf16"),
        "rstd": "*fp32",
        **dict.fromkeys(["num_rows", *strides("x", "residual", "out", "residual_out")], "i32"),
        "eps": "fp32",
    }
    backward = {
        **dict.fromkeys(["grad", "x", "weight", "residual_grad", "out", "codes"], "*bf16"),
        **dict.fromkeys(["rstd", "scales", "counts"], "*fp32"),
        **dict.fromkeys(["num_rows", *strides("grad", "x", "residual", "out"), "codes_row_stride"], "i32"),
    }
    constants = {
        "WIDTH": 5 * block // 4 if not single else block - block // 8,
        "HEADS": heads,
        "HAS_RESIDUAL": True,
        "SINGLE": single,
        "ROWS": rows,
        "BLOCK": block,
    }
    without = {"HAS_CODES": False, "HAS_COUNTS": False}
    for kernel, signature, more in (
        (module._rms_norm_kernel, forward, {}),
        (module._rms_norm_backward_kernel, backward, without),
    ):
        for metadata in compile_for(kernel, signature, {**constants, **more}, num_warps=8).values():
            assert metadata.shared <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 4096), (1000, 3584), (513, 4096), (64, 8192), (33, 14336), (1000, 40, 128)])
def test_bf16_on_the_gpu(shape, with_residual):
    check(shape, torch.bfloat16, "cuda", with_residual)
