"""SwiGLU's backward pass fused with the adapters' products against separate ones, whatever lies beside its columns."""

import pytest
import torch

from lsr_scale.kernels import swiglu_pair_gradients as module
from lsr_scale.kernels.swiglu_pair_gradients import swiglu_pair_gradients, swiglu_pair_gradients_triton
from tests.kernels.checks import assert_close_to_float64, compile_for, error, poisoned, strided
from tests.kernels.swiglu_inputs import FLOORS, gradients, randn


def adapter_case(rows, features, gate_columns, up_columns, down_rank, dtype, device, width=None):
    """Return the fused operation's arguments, everything that is no input being NaN."""
    width = max(sum(gate_columns), sum(up_columns)) if width is None else width
    gate_up = strided(randn(rows, 2 * features, dtype=dtype, device=device, scale=2.0), 8)
    grad = strided(randn(rows, features, dtype=dtype, device=device, seed=1), 16)
    xa = poisoned((rows, width + 8), dtype, device)[:, :width]
    for nth, (start, rank) in enumerate((gate_columns, up_columns)):
        xa[:, start : start + rank] = randn(rows, rank, dtype=dtype, device=device, seed=2 + nth)
    ds_down = poisoned((rows, max(width, down_rank) + 8), dtype, device)[:, : max(width, down_rank)]
    ds_down[:, :down_rank] = randn(rows, down_rank, dtype=dtype, device=device, seed=6)
    return grad, gate_up, xa, gate_columns, up_columns, ds_down, down_rank


def separate(grad, gate_up, xa, gate_columns, up_columns, ds_down, down_rank):
    """Return all results by autograd and plain products in the tensors' own dtype."""
    h, actual = gradients(grad, gate_up)
    pairs = []
    for one, (start, rank) in zip(actual.chunk(2, -1), (gate_columns, up_columns), strict=True):
        pairs.append(one.T @ xa[:, start : start + rank])
    return actual, *pairs, ds_down[:, :down_rank].T @ h


def doubled(arguments):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


def check_fused(rows, features, gate_columns, up_columns, down_rank, dtype, device, width=None, **config):
    arguments = adapter_case(rows, features, gate_columns, up_columns, down_rank, dtype, device, width)
    # a wider buffer, as the K-extended GEMM reads it; NaN beside it stays
    buffer = poisoned((rows, 2 * features + 24), dtype, device)
    out = buffer[:, : 2 * features]
    pairs = swiglu_pair_gradients_triton(*arguments, out, **config)
    assert buffer[:, 2 * features :].isnan().all()
    actual = (out, *pairs)
    expected = separate(*doubled(arguments))
    for one, reference, eager in zip(actual, expected, separate(*arguments), strict=True):
        # ranks' products round d gate, d up and h first: the dtype's own error, averaged
        assert_close_to_float64(one, reference, eager, FLOORS[dtype])
    for pair in pairs:
        assert pair.dtype == torch.float32
        assert pair.is_contiguous()
    # same bits again, and in place
    gate_up = arguments[1]
    pairs_again = swiglu_pair_gradients_triton(*arguments, gate_up, **config)
    for one, other in zip(actual, (gate_up, *pairs_again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "features", "gate_columns", "up_columns", "down_rank", "width"),
    [
        (1, 8, (0, 1), (1, 1), 1, None),
        (37, 200, (0, 4), (4, 4), 4, 64),
        (70, 136, (0, 16), (16, 16), 16, 64),
        (33, 72, (24, 5), (3, 20), 33, None),
        (33, 72, (0, 5), (5, 16), 1, 64),
        (64, 64, (0, 64), (64, 40), 3, None),
    ],
)
def test_fused_backward_agrees_with_float64(rows, features, gate_columns, up_columns, down_rank, width, dtype, device):
    config = {"vector": 4, "num_warps": 2, "num_programs": 8} if device == "cpu" else {}
    check_fused(rows, features, gate_columns, up_columns, down_rank, dtype, device, width, **config)


@pytest.mark.parametrize("num_programs", [1, 1000])
@pytest.mark.parametrize("vector", [2, 8])
def test_fused_backward_splits_tokens_or_not(num_programs, vector, device):
    config = {"vector": vector, "block_t": 32, "num_warps": 1, "max_registers": None, "num_programs": num_programs}
    check_fused(75, 72, (0, 8), (8, 8), 8, torch.float32, device, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("trials", "rows"), [(1, 37), (3, 50), (5, 1)])
def test_each_trial_s_products_are_of_its_own_rows(trials, rows, dtype, device):
    arguments = adapter_case(trials * rows, 72, (0, 8), (8, 4), 4, dtype, device, 16)
    arguments[0][:rows] = torch.inf  # what is not finite in one trial stays there
    out = poisoned((trials * rows, 144), dtype, device)
    found = swiglu_pair_gradients_triton(*arguments, out, trials, num_programs=8)
    reference = swiglu_pair_gradients(*doubled(arguments), poisoned(out.shape, torch.float64, device), trials)
    for trial in range(1, trials):
        own = slice(trial * rows, (trial + 1) * rows)
        cut = [value[own] if isinstance(value, torch.Tensor) else value for value in arguments]
        expected, eager = separate(*doubled(cut)), separate(*cut)
        for nth, one in enumerate((out[own], *(pair[trial] for pair in found))):
            assert_close_to_float64(one, expected[nth], eager[nth], FLOORS[dtype])
        for pair, exact in zip(reference, expected[1:], strict=True):
            assert error(pair[trial], exact) < 1e-14
    assert [pair.shape for pair in found] == [(trials, 72, 8), (trials, 72, 4), (trials, 4, 72)]


def test_programs_fill_whole_rounds_and_partial_results_stay_few():
    assert module._token_ranges(112, 528, 0.0047) == 14
    assert module._token_ranges(112, 528, 0.05) == 4
    assert module._token_ranges(86, 528, 0.0047) == 6
    assert module._token_ranges(1000, 528, 0.0) == 1


def test_fused_backward_takes_the_defaults_and_a_module_without_adapter(device):
    check_fused(40, 264, (0, 8), (8, 4), 4, torch.float16, device)
    arguments = adapter_case(20, 40, (0, 0), (0, 8), 4, torch.float16, device)
    out = poisoned((20, 80), torch.float16, device)
    gate_pair, up_pair, down = swiglu_pair_gradients_triton(*arguments, out)
    assert (gate_pair.shape, up_pair.shape, down.shape) == ((40, 0), (40, 8), (4, 40))
    expected, eager = separate(*doubled(arguments)), separate(*arguments)
    for nth, one in ((0, out), (2, up_pair), (3, down)):
        assert_close_to_float64(one, expected[nth], eager[nth], FLOORS[torch.float16])


def test_large_gates_give_finite_fused_results(device):
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1e30, -1e30, 1.0, 1.0] + [1.0] * 8], device=device)
    ones = torch.ones(1, 16, device=device)
    out = poisoned((1, 16), torch.float32, device)
    actual = swiglu_pair_gradients_triton(ones[:, :8], gate_up, ones, (0, 1), (1, 1), ones, 1, out)
    expected = swiglu_pair_gradients(
        ones[:, :8].double(), gate_up.double(), ones.double(), (0, 1), (1, 1), ones.double(), 1, out64 := out.double()
    )
    for one, reference in zip((out, *actual), (out64, *expected), strict=True):
        torch.testing.assert_close(one.double(), reference, rtol=1e-5, atol=1e-6)


def test_the_reference_is_float64_exact_and_is_what_runs_without_a_gpu():
    arguments = adapter_case(9, 24, (0, 3), (3, 5), 2, torch.float64, "cpu", width=16)
    out = poisoned((9, 48), torch.float64)
    pairs = swiglu_pair_gradients(*arguments, out)
    for one, expected in zip((out, *pairs), separate(*arguments), strict=True):
        assert error(one, expected) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "width", "vector", "num_warps"),
    [("bf16", 16, 4, 4), ("bf16", 32, 4, 4), ("bf16", 64, 2, 4), ("fp32", 16, 2, 4), ("fp32", 64, 2, 4)],
)
def test_fused_kernel_compiles_for_sm80_and_sm90(dtype, width, vector, num_warps):
    numbers = "num_rows features gate_start up_start gate_rank up_rank down_rank steps splits"
    row_strides = "grad_row_stride gate_up_row_stride xa_row_stride ds_down_row_stride out_row_stride"
    signature = {
        **dict.fromkeys(["grad", "gate_up", "xa", "ds_down", "out"], f"*{dtype}"),
        "pair_partial": "*fp32",
        **dict.fromkeys([*numbers.split(), *row_strides.split()], "i32"),
    }
    constants = {
        **{"STEPS": 0, "UNIT": 8, "UNMASKED": True, "INLINE_ASM": True, "BLOCK_T": 16, "VECTOR": vector},
        **{"WARPS": num_warps, "GATE": width, "UP": width, "DOWN": width},
    }
    kernel = module._swiglu_pair_gradients_kernel
    for metadata in compile_for(kernel, signature, constants, num_warps=num_warps, num_stages=1).values():
        # in 16 bits no more than the products' way out at the end: `4 * width` bytes per column
        allowed = 4 * width * 8 * vector * num_warps if dtype == "bf16" else 99 * 1024
        assert metadata.shared <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(
    "columns",
    [
        ((0, 16), (16, 16), 16, 64),
        ((0, 5), (5, 16), 1, 64),
        ((0, 4), (4, 4), 4, 8),
        ((0, 32), (32, 32), 32, 64),
        ((0, 64), (64, 64), 64, 128),
    ],
)
@pytest.mark.parametrize(("rows", "features"), [(1, 11008), (2048, 14336), (1037, 4864)])
def test_fused_backward_in_bf16_on_the_gpu(rows, features, columns):
    gate_columns, up_columns, down_rank, width = columns
    check_fused(rows, features, gate_columns, up_columns, down_rank, torch.bfloat16, "cuda", width)
