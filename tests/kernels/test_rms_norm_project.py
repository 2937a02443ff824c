"""RMSNorm with the adapters' down-projection against float64."""

import pytest
import torch

from lsr_scale.kernels import rms_norm_project as module
from lsr_scale.kernels.rms_norm_project import rms_norm_project, rms_norm_project_reference, rms_norm_project_triton
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned, strided
from tests.kernels.rms_norm_inputs import EPS, FLOORS, eager, forward64, inputs


def check_project(shape, num_columns, dtype, device, with_residual, rank=None, run=rms_norm_project_triton, **config):
    x, weight, residual, *_ = inputs(shape, dtype, device)
    residual = residual if with_residual else None
    rows, width = shape
    down = torch.zeros(num_columns, width, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    rank = num_columns if rank is None else rank
    down[:rank] = torch.randn((rank, width), generator=generator, dtype=torch.float64).to(dtype) / width**0.5
    results = []
    # another row stride may be another program, with another order of sums; the same one must repeat itself bit by bit
    for extra in (24, 0, 0):
        out = strided(poisoned((rows, width + num_columns), dtype, device), extra)
        xa, s_out = poisoned((rows, num_columns), dtype, device), poisoned(shape, dtype, device)
        rstd = run(
            strided(x, 8 + extra),
            weight,
            EPS,
            out,
            strided(down, num_columns + extra),
            xa,
            rank=rank,
            residual=None if residual is None else strided(residual, 16),
            residual_out=s_out if with_residual else None,
            **config,
        )
        results.append((out, xa, rstd))
    for first, second in zip(*results[1:], strict=True):
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
    results = []
    for in_place in (False, True):
        pair = [x.clone(), residual.clone()]
        s = pair[alias] if in_place else poisoned(x.shape, x.dtype, device)
        out, xa = poisoned((35, 88), x.dtype, device), poisoned((35, 16), x.dtype, device)
        rms_norm_project_triton(pair[0], weight, EPS, out, down, xa, residual=pair[1], residual_out=s, block=32)
        results.append((out, xa, s))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


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


@pytest.mark.parametrize(
    ("rank", "one_row", "with_residual"),
    [
        (0, False, False),
        (0, False, True),
        (48, True, False),
        (48, False, True),
        (128, False, False),
        (192, False, True),
    ],
)
def test_the_projection_compiles_for_sm80_and_sm90(rank, one_row, with_residual):
    row_strides = "x_row_stride residual_row_stride out_row_stride residual_out_row_stride down_row_stride"
    signature = {
        **dict.fromkeys(["x", "residual", "weight", "out", "residual_out", "down", "xa_out"], "*bf16"),
        "rstd": "*fp32",
        **dict.fromkeys(row_strides.split(), "i32"),
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
