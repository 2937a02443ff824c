"""SwiGLU against float64, in place; the fused backward against separate products, whatever lies beside its columns."""

import pytest
import torch
from checks import assert_close_to_float64, compile_for, error, pitched, poisoned
from torch.nn import functional

from lsr_scale.kernels import swiglu as module
from lsr_scale.kernels.swiglu import (
    swiglu,
    swiglu_adapter_backward,
    swiglu_adapter_backward_triton,
    swiglu_backward,
    swiglu_backward_triton,
    swiglu_triton,
)

FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def randn(*shape, dtype, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)


def gradients(grad, gate_up):
    """Return `(h, gradient of gate_up)` by autograd in the tensors' own dtype."""
    leaf = gate_up.detach().clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    h = functional.silu(gate) * up
    h.backward(grad)
    return h.detach(), leaf.grad


def floor(dtype, device):
    # the interpreter truncates to bf16 where the GPU rounds to nearest: twice the error
    return 4e-3 if dtype == torch.bfloat16 and device == "cpu" else FLOORS[dtype]


def check(rows, features, dtype, device, **config):
    gate_up = randn(rows, 2 * features, dtype=dtype, device=device, scale=2.0)
    grad = randn(rows, features, dtype=dtype, device=device, seed=1)
    h64, d64 = gradients(grad.double(), gate_up.double())
    h_eager, d_eager = gradients(grad, gate_up)
    out = pitched(poisoned((rows, features), dtype, device), 64)
    swiglu_triton(pitched(gate_up, 8), out, **config)
    assert_close_to_float64(out, h64, h_eager, floor(dtype, device))
    for with_h in (False, True):
        found = pitched(poisoned(gate_up.shape, dtype, device), 64)
        h = pitched(poisoned(grad.shape, dtype, device), 16) if with_h else None
        swiglu_backward_triton(pitched(grad, 8), pitched(gate_up, 24), found, h, **config)
        assert_close_to_float64(found, d64, d_eager, floor(dtype, device))
        assert h is None or torch.equal(h, out)
    swiglu_backward_triton(grad, gate_up, gate_up, grad, **config)
    assert torch.equal(gate_up, found)
    assert torch.equal(grad, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(1, 8), (3, 200), (5, 1032), (2, 2048)])
def test_both_directions_agree_with_float64_in_place_and_not(rows, features, dtype, device):
    check(rows, features, dtype, device)
    check(rows, features, dtype, device, block=128)


def test_large_gates_give_neither_nan_nor_infinity(device):
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    out, found = poisoned((1, 4), torch.float32, device), poisoned((1, 8), torch.float32, device)
    swiglu_triton(gate_up, out)
    swiglu_backward_triton(torch.ones(1, 4, device=device), gate_up, found)
    h64, d64 = gradients(torch.ones(1, 4, device=device).double(), gate_up.double())
    torch.testing.assert_close(out.double(), h64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), d64, rtol=1e-5, atol=1e-6)


def adapter_case(rows, features, gate_columns, up_columns, down_rank, dtype, device, width=None):
    """Return the fused operation's arguments, everything that it must not read being NaN."""
    used = max(sum(gate_columns), sum(up_columns))
    width = used + 8 if width is None else width
    gate_up = pitched(randn(rows, 2 * features, dtype=dtype, device=device, scale=2.0), 8)
    grad = pitched(randn(rows, features, dtype=dtype, device=device, seed=1), 16)
    xa, up = poisoned((rows, width + 8), dtype, device)[:, :width], poisoned((2 * features, width + 40), dtype, device)
    up = up[:, 40:]
    for nth, (start, rank) in enumerate((gate_columns, up_columns)):
        xa[:, start : start + rank] = randn(rows, rank, dtype=dtype, device=device, seed=2 + nth)
        up[nth * features : (nth + 1) * features, start : start + rank] = randn(
            features, rank, dtype=dtype, device=device, seed=4 + nth, scale=0.1
        )
    ds_down = poisoned((rows, down_rank + 5), dtype, device)
    ds_down[:, :down_rank] = randn(rows, down_rank, dtype=dtype, device=device, seed=6)
    return grad, gate_up, xa, up, gate_columns, up_columns, ds_down, down_rank


def separate(grad, gate_up, xa, up, gate_columns, up_columns, ds_down, down_rank):
    """Return all results by autograd and plain products in the tensors' own dtype."""
    features = grad.shape[1]
    h, found = gradients(grad, gate_up)
    ds, pairs = torch.zeros_like(xa), []
    for nth, (start, rank) in enumerate((gate_columns, up_columns)):
        rows, columns = slice(nth * features, (nth + 1) * features), slice(start, start + rank)
        ds[:, columns] = found[:, rows] @ up[rows, columns]
        pairs.append(found[:, rows].T @ xa[:, columns])
    return found, ds, *pairs, ds_down[:, :down_rank].T @ h


def doubled(arguments):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


def check_fused(rows, features, gate_columns, up_columns, down_rank, dtype, device, width=None, **config):
    arguments = adapter_case(rows, features, gate_columns, up_columns, down_rank, dtype, device, width)
    width = arguments[2].shape[1]
    # one buffer, as the K-extended GEMM reads it; NaN beside it stays
    buffer = poisoned((rows, 2 * features + width + 8), dtype, device)
    out, ds = buffer[:, : 2 * features], buffer[:, 2 * features : 2 * features + width]
    pairs = swiglu_adapter_backward_triton(*arguments, out, ds, **config)
    assert buffer[:, 2 * features + width :].isnan().all()
    found = (out, ds, *pairs)
    expected = separate(*doubled(arguments))
    for one, reference, eager in zip(found, expected, separate(*arguments), strict=True):
        # ranks' products round d gate, d up and h first: the dtype's own error, averaged
        assert_close_to_float64(one, reference, eager, FLOORS[dtype])
    for pair in pairs:
        assert pair.dtype == torch.float32
        assert pair.is_contiguous()
    ours = torch.zeros(width, dtype=torch.bool, device=device)
    for start, rank in (gate_columns, up_columns):
        ours[start : start + rank] = True
    assert (ds[:, ~ours] == 0).all()
    # same bits again, and in place
    gate_up = arguments[1]
    again = poisoned(ds.shape, dtype, device)
    pairs_again = swiglu_adapter_backward_triton(*arguments, gate_up, again, **config)
    for one, other in zip(found, (gate_up, again, *pairs_again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "features", "gate_columns", "up_columns", "down_rank"),
    [
        (1, 8, (0, 1), (1, 1), 1),
        (37, 200, (0, 4), (4, 4), 4),
        (70, 136, (0, 16), (16, 16), 16),
        (33, 72, (24, 5), (3, 20), 33),
        (64, 64, (0, 64), (64, 40), 3),
    ],
)
def test_fused_backward_agrees_with_float64(rows, features, gate_columns, up_columns, down_rank, dtype, device):
    config = {"block_t": 16, "block_f": 64, "num_programs": 8} if device == "cpu" else {}
    check_fused(rows, features, gate_columns, up_columns, down_rank, dtype, device, **config)


@pytest.mark.parametrize("num_programs", [1, 1000])
def test_fused_backward_splits_tokens_or_not(num_programs, device):
    check_fused(150, 72, (0, 8), (8, 8), 8, torch.float32, device, block_t=16, block_f=32, num_programs=num_programs)


def test_fused_backward_takes_the_defaults_and_a_module_without_adapter(device):
    check_fused(40, 264, (0, 8), (8, 4), 4, torch.float16, device)
    arguments = adapter_case(20, 40, (0, 0), (0, 8), 4, torch.float16, device)
    out, ds = poisoned((20, 80), torch.float16, device), poisoned((20, 16), torch.float16, device)
    gate_pair, up_pair, down = swiglu_adapter_backward_triton(*arguments, out, ds)
    assert (gate_pair.shape, up_pair.shape, down.shape) == ((40, 0), (40, 8), (4, 40))
    expected, eager = separate(*doubled(arguments)), separate(*arguments)
    for nth, one in ((0, out), (1, ds), (3, up_pair), (4, down)):
        assert_close_to_float64(one, expected[nth], eager[nth], FLOORS[torch.float16])


def test_references_are_float64_exact_and_are_what_runs_without_a_gpu():
    arguments = adapter_case(9, 24, (0, 3), (3, 5), 2, torch.float64, "cpu", width=16)
    grad, gate_up = arguments[:2]
    h64, d64 = gradients(grad, gate_up)
    out, ds, h = poisoned((9, 48), torch.float64), poisoned((9, 16), torch.float64), poisoned((9, 24), torch.float64)
    swiglu(gate_up, h)
    assert error(h, h64) < 1e-14
    pairs = swiglu_adapter_backward(*arguments, out, ds)
    for one, expected in zip((out, ds, *pairs), separate(*arguments), strict=True):
        assert error(one, expected) < 1e-14
    swiglu_backward(grad, gate_up, gate_up, grad)
    assert error(gate_up, d64) < 1e-14
    assert error(grad, h64) < 1e-14


def test_elementwise_kernels_compile_for_sm80_and_sm90():
    forward = {"gate_up": "*bf16", "out": "*bf16", **dict.fromkeys(["features", "gate_up_pitch", "out_pitch"], "i32")}
    numbers = ["features", "grad_pitch", "gate_up_pitch", "out_pitch", "h_pitch"]
    backward = {**dict.fromkeys(["grad", "gate_up", "out", "h_out"], "*bf16"), **dict.fromkeys(numbers, "i32")}
    found = [
        compile_for(module._swiglu_kernel, forward, {"BLOCK": 1024}),
        compile_for(module._swiglu_backward_kernel, backward, {"BLOCK": 1024, "HAS_H": True}),
    ]
    assert all(metadata.shared <= 99 * 1024 for each in found for metadata in each.values())


@pytest.mark.parametrize(
    ("block_t", "block_f", "num_warps", "width"),
    [(32, 256, 16, 16), (32, 128, 8, 16), (32, 128, 16, 32), (32, 64, 8, 64)],
)
def test_fused_kernels_compile_for_sm80_and_sm90(block_t, block_f, num_warps, width):
    columns = "gate_start up_start gate_rank up_rank"
    pitches = "grad_pitch gate_up_pitch xa_pitch up_pitch ds_down_pitch out_pitch"
    signature = {
        **dict.fromkeys(["grad", "gate_up", "xa", "up_rows", "ds_down", "out"], "*bf16"),
        **dict.fromkeys(["ds_partial", "pair_partial"], "*fp32"),
        **dict.fromkeys(["num_rows", "features", "down_rank", "steps", *columns.split(), *pitches.split()], "i32"),
    }
    widths = {"GATE": width, "UP": width}
    constants = {"STEPS": 0, "BLOCK_T": block_t, "BLOCK_F": block_f, "DOWN": width, "PIN": True, **widths}
    kernel = module._swiglu_adapter_backward_kernel
    # the widest is for GPUs with 163 KiB (A100) or 227 (H100) only: the launcher asks
    limit = 160 * 1024 if block_f == 256 else 99 * 1024
    for metadata in compile_for(kernel, signature, constants, num_warps=num_warps, num_stages=2).values():
        assert metadata.shared <= limit
    signature = {
        "ds_partial": "*fp32",
        "ds_out": "*bf16",
        **dict.fromkeys(["num_rows", "num_columns", "ds_pitch", *columns.split()], "i32"),
    }
    for metadata in compile_for(module._sum_ds_kernel, signature, {"NUM_BLOCKS": 224, "BLOCK": 256, **widths}).values():
        assert metadata.shared <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(("rows", "features"), [(1, 11008), (1000, 14336), (513, 4864)])
def test_bf16_on_the_gpu(rows, features):
    check(rows, features, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(
    "columns", [((0, 16), (16, 16), 16, 64), ((0, 4), (4, 4), 4, 64), ((0, 64), (64, 64), 64, 128)]
)
@pytest.mark.parametrize(("rows", "features"), [(1, 11008), (2048, 14336), (1037, 4864)])
def test_fused_backward_in_bf16_on_the_gpu(rows, features, columns):
    gate_columns, up_columns, down_rank, width = columns
    check_fused(rows, features, gate_columns, up_columns, down_rank, torch.bfloat16, "cuda", width)
