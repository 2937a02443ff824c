"""Rows with pairs of their own against float64."""

from typing import Any

import pytest
import torch

from lsr_scale.kernels.row_pairs import add_row_pairs_, add_row_pairs_reference, add_row_pairs_triton
from tests.kernels.checks import OnGpu, assert_close_to_float64, launched, strided


def case(rows, rank, inputs, outputs, dtype, device):
    """Return operands whose rows lie apart from one another, as those of one module among several."""
    generator = torch.Generator().manual_seed(rows)
    y, x, down, up = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((rows, outputs), (rows, inputs), (rows, 3, rank, inputs), (rows, 3, outputs, rank))
    )
    return strided(y, 8), strided(x, 3), down[:, 1], up[:, 1]


@pytest.mark.parametrize("run", [add_row_pairs_triton, add_row_pairs_reference])
@pytest.mark.parametrize("sizes", [(1, 1, 48, 80), (3, 4, 130, 129), (5, 16, 700, 300), (2, 24, 5000, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(sizes: Any, dtype, run, device):
    if run is add_row_pairs_triton:
        pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    y, x, down, up = case(*sizes, dtype=dtype, device=device)
    exact = y.double() + torch.einsum("br,bnr->bn", torch.einsum("bk,brk->br", x.double(), down.double()), up.double())
    eager = torch.baddbmm(y[:, None].float(), torch.bmm(x[:, None].float(), down.float().mT), up.float().mT)[:, 0]
    poison = y.as_strided((1, y.stride(0)), (y.stride(0), 1))[:, y.shape[1] :]
    assert run(y, x, down, up).data_ptr() == y.data_ptr()
    assert_close_to_float64(y, exact, eager.to(dtype), 1e-6 if dtype == torch.float32 else 4e-3)
    assert poison.isnan().all()


def test_float64_is_exact_and_shapes_are_checked():
    y, x, down, up = case(2, 3, 20, 10, torch.float64, "cpu")
    exact = y + (up @ (down @ x[..., None]))[..., 0]
    torch.testing.assert_close(add_row_pairs_(y, x, down, up), exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected"):
        add_row_pairs_(y, x, down, up.mT)
    with pytest.raises(ValueError, match="contiguous"):
        add_row_pairs_(y, x, down.mT.contiguous().mT, up)


def llama():
    """Do what the linears of LLaMA-3.2-1B of most inputs and most outputs do for 64 rows."""
    empty = OnGpu.empty
    for inputs, outputs in ((2048, 8192), (8192, 2048)):
        add_row_pairs_(
            empty(64, outputs), empty(64, inputs), empty(64, 16, 16, inputs)[:, 3], empty(64, 16, outputs, 16)[:, 3]
        )


def test_it_compiles_for_every_gpu():
    launches = launched(llama, shared_bytes=99 * 1024, capabilities=(80, 86, 90, 100, 120))
    assert {name for name, _, _ in launches} == {"_down_kernel", "_up_kernel"}
    assert max(used for _, _, used in launches) <= 99 * 1024
