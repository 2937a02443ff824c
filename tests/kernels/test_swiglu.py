"""SwiGLU both ways against float64, in place and not."""

import pytest
import torch

from lsr_scale.kernels import swiglu as module
from lsr_scale.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_triton, swiglu_triton
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned, strided
from tests.kernels.swiglu_inputs import FLOORS, gradients, randn


def floor(dtype, device):
    # the interpreter truncates to bf16 where the GPU rounds to nearest: twice the error
    return 4e-3 if dtype == torch.bfloat16 and device == "cpu" else FLOORS[dtype]


def check(rows, features, dtype, device, **config):
    gate_up = randn(rows, 2 * features, dtype=dtype, device=device, scale=2.0)
    grad = randn(rows, features, dtype=dtype, device=device, seed=1)
    h64, d64 = gradients(grad.double(), gate_up.double())
    h_eager, d_eager = gradients(grad, gate_up)
    out = strided(poisoned((rows, features), dtype, device), 64)
    swiglu_triton(strided(gate_up, 8), out, **config)
    assert_close_to_float64(out, h64, h_eager, floor(dtype, device))
    for with_h in (False, True):
        actual = strided(poisoned(gate_up.shape, dtype, device), 64)
        h = strided(poisoned(grad.shape, dtype, device), 16) if with_h else None
        swiglu_backward_triton(strided(grad, 8), strided(gate_up, 24), actual, h, **config)
        assert_close_to_float64(actual, d64, d_eager, floor(dtype, device))
        assert h is None or torch.equal(h, out)
    swiglu_backward_triton(grad, gate_up, gate_up, grad, **config)
    assert torch.equal(gate_up, actual)
    assert torch.equal(grad, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(1, 8), (3, 200), (5, 1032), (2, 2048)])
def test_both_directions_agree_with_float64_in_place_and_not(rows, features, dtype, device):
    check(rows, features, dtype, device)
    check(rows, features, dtype, device, block=128)


def test_large_gates_give_neither_nan_nor_infinity(device):
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    out, actual = poisoned((1, 4), torch.float32, device), poisoned((1, 8), torch.float32, device)
    swiglu_triton(gate_up, out)
    swiglu_backward_triton(torch.ones(1, 4, device=device), gate_up, actual)
    h64, d64 = gradients(torch.ones(1, 4, device=device).double(), gate_up.double())
    torch.testing.assert_close(out.double(), h64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.double(), d64, rtol=1e-5, atol=1e-6)


def test_the_reference_is_float64_exact_and_is_what_runs_without_a_gpu():
    gate_up, grad = randn(9, 48, dtype=torch.float64, scale=2.0), randn(9, 24, dtype=torch.float64, seed=1)
    h64, d64 = gradients(grad, gate_up)
    h = poisoned((9, 24), torch.float64)
    swiglu(gate_up, h)
    assert error(h, h64) < 1e-14
    swiglu_backward(grad, gate_up, gate_up, grad)
    assert error(gate_up, d64) < 1e-14
    assert error(grad, h64) < 1e-14


def test_elementwise_kernels_compile_for_sm80_and_sm90():
    forward = {
        "gate_up": "*bf16",
        "out": "*bf16",
        **dict.fromkeys(["features", "gate_up_row_stride", "out_row_stride"], "i32"),
    }
    numbers = ["features", "grad_row_stride", "gate_up_row_stride", "out_row_stride", "h_row_stride"]
    backward = {**dict.fromkeys(["grad", "gate_up", "out", "h_out"], "*bf16"), **dict.fromkeys(numbers, "i32")}
    actual = [
        compile_for(module._swiglu_kernel, forward, {"BLOCK": 1024}),
        compile_for(module._swiglu_backward_kernel, backward, {"BLOCK": 1024, "HAS_H": True}),
    ]
    assert all(metadata.shared <= 99 * 1024 for each in actual for metadata in each.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(("rows", "features"), [(1, 11008), (1000, 14336), (513, 4864)])
def test_bf16_on_the_gpu(rows, features):
    check(rows, features, torch.bfloat16, "cuda")
