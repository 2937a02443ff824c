"""The rotary embedding against float64 and transformers' own, in place, its inverse as the exact transpose."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lsr_scale.kernels import rotary as module
from lsr_scale.kernels.rotary import rotate, rotate_reference, rotate_triton
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned

FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def tables(positions, width, dtype=torch.float32, device="cpu"):
    angles = torch.arange(positions)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)[None]
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def heads_of(tokens, heads, width, dtype, device="cpu", extra=0):
    """Return the heads as a slice of a wider projection whose other columns are poisoned."""
    wide = poisoned((tokens, heads * width + extra), dtype, device)
    view = wide[:, : heads * width].view(tokens, heads, width)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(0)))
    return wide, view


def rotate64(x, cos, sin, inverse=False):
    out = torch.empty_like(x, dtype=torch.float64)
    rotate_reference(x.double(), cos.double(), sin.double(), out, inverse=inverse)
    return out


def eager(x, cos, sin, inverse=False):
    positions = torch.arange(x.shape[0], device=x.device) % cos.shape[0]
    cos, sin = cos.to(x.dtype)[positions, None], sin.to(x.dtype)[positions, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * (-sin if inverse else sin)


def check(shape, positions, dtype, table_dtype, inverse, device, **config):
    wide, x = heads_of(*shape, dtype, device, extra=24)
    cos, sin = tables(positions, shape[2], table_dtype, device)
    target, out = heads_of(*shape, dtype, device, extra=40)
    out.fill_(float("nan"))
    rotate_triton(x, cos, sin, out, inverse=inverse, **config)
    assert_close_to_float64(out, rotate64(x, cos, sin, inverse), eager(x, cos, sin, inverse), FLOORS[dtype])
    assert target[:, shape[1] * shape[2] :].isnan().all()
    rotate_triton(x, cos, sin, x, inverse=inverse, **config)
    assert torch.equal(x, out)
    assert wide[:, shape[1] * shape[2] :].isnan().all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "positions"), [((1, 1, 8), 1), ((10, 3, 24), 5), ((7, 5, 64), 7), ((4, 40, 16), 2)])
def test_views_in_place_and_not_agree_with_float64(shape, positions, dtype, inverse, device):
    check(shape, positions, dtype, torch.float32, inverse, device)
    check(shape, positions, dtype, dtype, inverse, device, block_heads=4)


def test_it_is_what_transformers_computes(device):
    _, x = heads_of(12, 4, 32, torch.float32, device)
    cos, sin = tables(6, 32, device=device)
    actual = poisoned(x.shape, x.dtype, device)
    rotate_triton(x, cos, sin, actual)
    states = x.view(2, 6, 4, 32).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(states, states, cos[None], sin[None])
    torch.testing.assert_close(actual.view(2, 6, 4, 32).transpose(1, 2), expected)


def test_the_inverse_is_the_gradient_even_for_tables_whose_halves_differ(device):
    generator = torch.Generator().manual_seed(1)
    x, cos, sin, grad = (torch.randn(*shape, generator=generator) for shape in ((6, 2, 8), (6, 8), (6, 8), (6, 2, 8)))
    leaf = x.double().requires_grad_()
    first, second = leaf.chunk(2, -1)
    out = leaf * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]
    out.backward(grad.double())
    assert error(rotate64(x, cos, sin), out.detach()) < 1e-14
    assert error(rotate64(grad, cos, sin, inverse=True), leaf.grad) < 1e-14
    actual = poisoned(x.shape, x.dtype, device)
    rotate_triton(grad.to(device), cos.to(device), sin.to(device), actual, inverse=True)
    assert error(actual, leaf.grad) < 1e-6
    again = torch.empty_like(grad)
    rotate(grad, cos, sin, again, inverse=True)
    assert error(again, leaf.grad) < 1e-6


@pytest.mark.parametrize("table", ["*fp32", "*bf16"])
def test_kernel_compiles_for_sm80_and_sm90(table):
    strides = "x_row_stride x_head_stride out_row_stride out_head_stride cos_row_stride sin_row_stride"
    numbers = f"num_heads half num_positions {strides}"
    signature = {"x": "*bf16", "cos": table, "sin": table, "out": "*bf16", **dict.fromkeys(numbers.split(), "i32")}
    for inverse in (False, True):
        constants = {"INVERSE": inverse, "HEADS": 32, "HALF": 64}
        for metadata in compile_for(module._rotate_kernel, signature, constants).values():
            assert metadata.shared <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "positions"), [((1, 40, 128), 1), ((1000, 40, 128), 250), ((513, 28, 64), 513)])
def test_bf16_on_the_gpu(shape, positions, inverse, table_dtype):
    check(shape, positions, torch.bfloat16, table_dtype, inverse, "cuda")
