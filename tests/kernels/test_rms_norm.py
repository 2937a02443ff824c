"""RMSNorm both ways and with a projection against float64: in place, per head, rows too long for one block."""

import pytest
import torch

from lsr_scale.kernels import rms_norm as module
from lsr_scale.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_backward_triton,
    rms_norm_project,
    rms_norm_project_reference,
    rms_norm_project_triton,
    rms_norm_reference,
    rms_norm_triton,
)
from tests.kernels.checks import assert_close_to_float64, compile_for, error, pitched, poisoned

EPS = 1e-5
FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def inputs(shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad, residual_grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    weight = 1 + 0.2 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).to(device) for tensor in (x, weight, residual, grad, residual_grad)]


def forward64(x, weight, residual=None):
    """Return `(s, out)` in float64 for the input as the dtype rounds it."""
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    s = s.double()
    return s, s * (s.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def eager(x, weight, residual=None):
    s = x if residual is None else x + residual
    normalized = s.float() * (s.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    return weight * normalized.to(x.dtype)


def check(shape, dtype, device, with_residual, **config):
    x, weight, residual, grad, residual_grad = inputs(shape, dtype, device)
    residual, residual_grad = (residual, residual_grad) if with_residual else (None, None)
    three = len(shape) == 3

    def view(tensor, extra):
        if tensor is None:
            return None
        return pitched(tensor.flatten(1), extra).unflatten(1, shape[1:]) if three else pitched(tensor, extra)

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
    found = view(poisoned(shape, dtype, device), 8)
    rms_norm_backward_triton(
        view(grad, 16), view(s64.to(dtype), 8), weight, rstd, found, residual_grad=view(residual_grad, 24), **config
    )
    assert_close_to_float64(found, expected, plain, FLOORS[dtype])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 48), (33, 200), (5, 1536), (7, 3, 64), (5, 2, 24), (1, 1, 128)])
def test_both_directions_agree_with_float64_on_pitched_views(shape, dtype, with_residual, device):
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
        found = poisoned(x.shape, x.dtype, device)
        rms_norm_triton(pair[0], weight, EPS, found, residual=pair[1], residual_out=pair[alias], block=block)
        assert torch.equal(found, out)
        assert torch.equal(pair[alias], s)
        pair = [x.clone(), residual.clone()]
        rms_norm_triton(pair[0], weight, EPS, pair[alias], residual=pair[1], residual_out=found, block=block)
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
    found = torch.empty_like(x)
    rms_norm_backward(grad, s, weight, rstd, found, residual_grad=residual_grad)
    assert error(found, leaf.grad + residual_grad) < 1e-14
    again = torch.empty_like(x)
    assert torch.equal(rms_norm_reference(s, weight, EPS, again), rstd)
    assert torch.equal(again, out)
    rms_norm_backward_reference(grad, s, weight, rstd, again)
    assert error(again, leaf.grad) < 1e-14


@pytest.mark.parametrize(
    ("rows", "block", "single", "heads"), [(1, 4096, True, 1), (16, 128, True, 40), (1, 8192, False, 1)]
)
def test_kernels_compile_for_sm80_and_sm90(rows, block, single, heads):
    strides = "x_pitch x_head residual_pitch residual_head out_pitch out_head residual_out_pitch residual_out_head"
    forward = {
        **dict.fromkeys(["x", "residual", "weight", "out", "residual_out"], "*bf16"),
        "rstd": "*fp32",
        **dict.fromkeys(["num_rows", *strides.split()], "i32"),
        "eps": "fp32",
    }
    strides = "grad_pitch grad_head x_pitch x_head residual_pitch residual_head out_pitch out_head"
    backward = {
        **dict.fromkeys(["grad", "x", "weight", "residual_grad", "out"], "*bf16"),
        "rstd": "*fp32",
        **dict.fromkeys(["num_rows", *strides.split()], "i32"),
    }
    constants = {
        "WIDTH": 5 * block // 4 if not single else block - block // 8,
        "HEADS": heads,
        "HAS_RESIDUAL": True,
        "SINGLE": single,
        "ROWS": rows,
        "BLOCK": block,
    }
    for kernel, signature in ((module._rms_norm_kernel, forward), (module._rms_norm_backward_kernel, backward)):
        for metadata in compile_for(kernel, signature, constants, num_warps=8).values():
            assert metadata.shared <= 99 * 1024


def check_project(shape, num_columns, dtype, device, with_residual, rank=None, run=rms_norm_project_triton, **config):
    x, weight, residual, *_ = inputs(shape, dtype, device)
    residual = residual if with_residual else None
    rows, width = shape
    down = torch.zeros(num_columns, width, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    rank = num_columns if rank is None else rank
    down[:rank] = torch.randn((rank, width), generator=generator, dtype=torch.float64).to(dtype) / width**0.5
    found = []
    # another pitch may be another program, with another order of sums; the same one must repeat itself bit by bit
    for extra in (24, 0, 0):
        out = pitched(poisoned((rows, width + num_columns), dtype, device), extra)
        xa, s_out = poisoned((rows, num_columns), dtype, device), poisoned(shape, dtype, device)
        rstd = run(
            pitched(x, 8 + extra),
            weight,
            EPS,
            out,
            pitched(down, num_columns + extra),
            xa,
            rank=rank,
            residual=None if residual is None else pitched(residual, 16),
            residual_out=s_out if with_residual else None,
            **config,
        )
        found.append((out, xa, rstd))
    for first, second in zip(*found[1:], strict=True):
        assert torch.equal(first, second)
    s64, out64 = forward64(x, weight, residual)
    normalized = eager(x, weight, residual)
    assert_close_to_float64(out[:, :width], out64, normalized, FLOORS[dtype])
    assert_close_to_float64(xa, out64 @ down.double().t(), normalized @ down.t(), FLOORS[dtype])
    # of the rounded values, rounded once
    exact = out[:, :width].double() @ down.double().t()
    assert_close_to_float64(xa, exact, exact.to(dtype), 3e-6)
    assert torch.equal(out[:, width:], xa)
    assert not xa[:, rank:].any()
    torch.testing.assert_close(rstd.double(), (s64.square().mean(-1) + EPS).rsqrt(), rtol=1e-5, atol=0)
    assert not with_residual or torch.equal(s_out, s64.to(dtype))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank", "config"),
    [
        ((37, 136), 64, 48, {}),
        ((1, 8), 16, 3, {}),
        ((17, 264), 64, 10, dict(rows=16, block=64, block_k=32, sum_stages=2)),
        ((65, 128), 128, None, dict(rows=64, block=32, block_k=64, num_warps=16)),
        ((33, 200), 48, None, dict(block_k=256, num_stages=1)),
        ((5, 72), 192, 20, {}),
        ((5, 72), 192, None, {}),
        ((3, 40), 64, 0, {}),
    ],
)
def test_norm_and_projection_agree_with_float64(shape, num_columns, rank, config, dtype, with_residual, device):
    check_project(shape, num_columns, dtype, device, with_residual, rank, **config)


@pytest.mark.parametrize("alias", [0, 1])
def test_the_sum_before_a_projection_may_replace_a_summand(alias, device):
    x, weight, residual, *_ = inputs((35, 72), torch.float16, device)
    down = inputs((16, 72), torch.float16, device)[0]
    found = []
    for in_place in (False, True):
        pair = [x.clone(), residual.clone()]
        s = pair[alias] if in_place else poisoned(x.shape, x.dtype, device)
        out, xa = poisoned((35, 88), x.dtype, device), poisoned((35, 16), x.dtype, device)
        rms_norm_project_triton(pair[0], weight, EPS, out, down, xa, residual=pair[1], residual_out=s, block=32)
        found.append((out, xa, s))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_the_projection_reference_is_float64_exact_and_is_what_runs_without_a_gpu():
    x, weight, residual, *_ = inputs((6, 40), torch.float64)
    down = inputs((16, 40), torch.float64, seed=1)[0]
    for run in (rms_norm_project, rms_norm_project_reference):
        out, xa, s = poisoned((6, 56), x.dtype), poisoned((6, 16), x.dtype), poisoned((6, 40), x.dtype)
        rstd = run(x, weight, EPS, out, down, xa, residual=residual, residual_out=s)
        s64 = x + residual
        out64 = torch.nn.functional.rms_norm(s64, (40,), weight, EPS)
        assert torch.equal(s, s64)
        assert error(out, torch.cat((out64, out64 @ down.t()), 1)) < 1e-14
        assert torch.equal(out[:, 40:], xa)
        assert rstd.dtype == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_project((7, 72), 48, dtype, "cpu", True, 20, rms_norm_project)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rank", "one_row"), [(0, False), (48, True), (48, False), (128, False), (192, False)])
def test_the_projection_compiles_for_sm80_and_sm90(rank, one_row, with_residual):
    pitches = "x_pitch residual_pitch out_pitch residual_out_pitch down_pitch"
    signature = {
        **dict.fromkeys(["x", "residual", "weight", "out", "residual_out", "down", "xa_out"], "*bf16"),
        "rstd": "*fp32",
        **dict.fromkeys(pitches.split(), "i32"),
        "eps": "fp32",
    }
    block_r = max(16, 1 << (rank - 1).bit_length())
    constants = dict(
        WIDTH=4096, R=max(64, -(-rank // 64) * 64), RANK=rank, HAS_RESIDUAL=with_residual, PIN=True, ROWS=32
    )
    constants |= dict(BLOCK=256 if with_residual else 512, BLOCK_K=min(128, 16384 // block_r), BLOCK_R=block_r)
    if one_row:
        # Triton makes a constant of an argument that is 1
        constants["num_rows"] = 1
    else:
        signature["num_rows"] = "i32"
    for metadata in compile_for(
        module._rms_norm_project_kernel, signature, {**constants, "SUM_STAGES": None}, num_warps=8
    ).values():
        assert metadata.shared <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_columns", "rank"),
    [
        ((1, 4096), 64, 48),
        ((1000, 3584), 64, 32),
        ((513, 4096), 128, None),
        ((64, 8192), 64, 16),
        ((100, 4104), 48, 48),
        ((100, 4096), 192, None),
    ],
)
def test_projection_in_bf16_on_the_gpu(shape, num_columns, rank, with_residual):
    for run in (rms_norm_project, rms_norm_project_triton):
        check_project(shape, num_columns, torch.bfloat16, "cuda", with_residual, rank, run)
    check_project(shape, num_columns, torch.float32, "cuda", with_residual, rank, rms_norm_project)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 4096), (1000, 3584), (513, 4096), (64, 8192), (33, 14336), (1000, 40, 128)])
def test_bf16_on_the_gpu(shape, with_residual):
    check(shape, torch.bfloat16, "cuda", with_residual)
