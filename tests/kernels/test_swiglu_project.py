"""SwiGLU and its product with a down-projection, in one pass, against float64."""

import pytest
import torch

from lsr_scale.kernels import swiglu_project as module
from lsr_scale.kernels.swiglu_project import swiglu_project, swiglu_project_reference, swiglu_project_triton
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned, strided

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")

FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def inputs(rows, features, num_columns, rank, dtype, device="cpu"):
    """Return gate_up and down, whose rows from `rank` on are zero."""
    generator = torch.Generator().manual_seed(rows)
    gate_up = 2 * torch.randn((rows, 2 * features), generator=generator, dtype=torch.float64)
    down = torch.randn((num_columns, features), generator=generator, dtype=torch.float64) / features**0.5
    down[rank:] = 0
    return gate_up.to(dtype).to(device), down.to(dtype).to(device)


def check(rows, features, num_columns, rank, dtype, device, run=swiglu_project_triton, **config):
    filled = num_columns if rank is None else rank
    gate_up, down = inputs(rows, features, num_columns, filled, dtype, device)
    results = []
    for extra in (0, 24):
        out = strided(poisoned((rows, features + num_columns), dtype, device), extra)
        xa = poisoned((rows, num_columns), dtype, device)
        run(strided(gate_up, extra), out, strided(down, num_columns + extra), xa, rank=rank, **config)
        results.append((out, xa))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    h = out[:, :features]
    gate, up = gate_up.double().chunk(2, 1)
    h64 = gate * gate.sigmoid() * up
    gate, up = gate_up.chunk(2, 1)
    eager = torch.nn.functional.silu(gate) * up
    assert_close_to_float64(h, h64, eager, FLOORS[dtype])
    assert_close_to_float64(xa, h64 @ down.double().t(), eager @ down.t(), FLOORS[dtype])
    # of the rounded values, rounded once
    exact = h.double() @ down.double().t()
    assert_close_to_float64(xa, exact, exact.to(dtype), 3e-6)
    assert torch.equal(out[:, features:], xa)
    assert not xa[:, filled:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "features", "num_columns", "rank", "config"),
    [
        (37, 200, 64, 16, dict(block_t=32)),
        (1, 8, 16, 3, {}),
        (17, 264, 64, 10, dict(block_t=16, block_f=32, splits=3)),
        (65, 392, 128, None, dict(block_t=64, block_f=32, splits=8, num_warps=8)),  # one range has fewer blocks
        (20, 136, 48, None, dict(block_t=16, splits=1)),
        (19, 72, 192, 20, {}),
        (19, 72, 192, None, {}),
        (3, 40, 64, 0, {}),
    ],
)
def test_agrees_with_float64(rows, features, num_columns, rank, config, dtype, device):
    check(rows, features, num_columns, rank, dtype, device, **config)


def test_the_reference_is_float64_exact_and_is_what_runs_without_a_gpu():
    gate_up, down = inputs(6, 40, 32, 20, torch.float64)
    gate, up = gate_up.chunk(2, 1)
    h = torch.nn.functional.silu(gate) * up
    for run in (swiglu_project, swiglu_project_reference):
        out, xa = poisoned((6, 72), torch.float64), poisoned((6, 32), torch.float64)
        run(gate_up, out, down, xa, rank=20)
        assert error(out, torch.cat((h, h @ down.t()), 1)) < 1e-14
        assert torch.equal(out[:, 40:], xa)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(7, 72, 48, 20, dtype, "cpu", swiglu_project)


@pytest.mark.parametrize(("rank", "limit"), [(16, 99), (64, 99), (128, 99)])
def test_compiles_for_sm80_and_sm90(rank, limit):
    signature = dict.fromkeys(["gate_up", "out", "down"], "*bf16") | dict(xa_partial="*fp32")
    signature |= dict.fromkeys(["num_rows", "gate_up_row_stride", "out_row_stride", "down_row_stride"], "i32")
    constants = dict(FEATURES=14336, RANK=rank, STEPS=14, PIN=True, BLOCK_T=32, BLOCK_R=rank)
    constants |= dict(BLOCK_F=min(128, 8192 // rank))
    for metadata in compile_for(module._swiglu_project_kernel, signature, constants).values():
        # an A100 gives a program 163 KB
        assert metadata.shared <= limit * 1024
    signature = dict(xa_partial="*fp32", out="*bf16", xa_out="*bf16", num_rows="i32", out_row_stride="i32")
    constants = dict(FEATURES=14336, R=rank, SPLITS=8, BLOCK_R=rank, BLOCK=512)
    for metadata in compile_for(module._reduce_partials_kernel, signature, constants).values():
        assert metadata.shared <= 16 * 1024


def test_compiles_for_one_row():
    """Triton makes a constant of an argument that is 1."""
    signature = dict.fromkeys(["gate_up", "out", "down"], "*bf16") | dict(xa_partial="*fp32")
    signature |= dict.fromkeys(["gate_up_row_stride", "out_row_stride", "down_row_stride"], "i32")
    constants = dict(FEATURES=512, RANK=16, STEPS=1, PIN=True, BLOCK_T=32, BLOCK_F=128, BLOCK_R=16, num_rows=1)
    compile_for(module._swiglu_project_kernel, signature, constants)
    signature = dict(xa_partial="*fp32", out="*bf16", xa_out="*bf16", out_row_stride="i32")
    constants = dict(FEATURES=512, R=64, SPLITS=4, BLOCK_R=16, BLOCK=512, num_rows=1)
    compile_for(module._reduce_partials_kernel, signature, constants)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(
    ("rows", "features", "num_columns", "rank"),
    [
        (2061, 14336, 64, 16),
        (1, 11008, 64, 4),
        (1000, 14336, 64, None),
        (513, 4104, 128, None),
        (100, 4096, 192, None),
    ],
)
def test_bf16_on_the_gpu(rows, features, num_columns, rank):
    for run in (swiglu_project, swiglu_project_triton):
        check(rows, features, num_columns, rank, torch.bfloat16, "cuda", run)
    check(rows, features, num_columns, rank, torch.float32, "cuda", swiglu_project)
