"""Decompositions by blocks are torch's: of matrices with full rank, low rank, scales of many decades, and zeros."""

import pytest
import torch

from lsr_scale.training.optimizers import eigh as module
from lsr_scale.training.optimizers.eigh import eigh, eigh_by_blocks


def spectrum(size, values):
    """Return matrices with some eigenvalues `[n, size]`."""
    generator = torch.Generator().manual_seed(size)
    vectors = torch.linalg.qr(torch.randn(len(values), size, size, generator=generator, dtype=torch.float64)).Q
    return (vectors * values[:, None, :]) @ vectors.mT


def cases(size):
    ones = torch.ones(3, size, dtype=torch.float64)
    return {
        "decades": spectrum(size, ones * torch.logspace(0, -12, size, dtype=torch.float64)),
        "low rank": spectrum(size, ones * (torch.arange(size) < 10)),
        "clustered": spectrum(size, ones + 1e-9 * torch.arange(size)),
        "both signs": spectrum(size, ones * torch.linspace(-1, 1, size, dtype=torch.float64)),
        "tiny": spectrum(size, 1e-30 * (ones + torch.arange(size))),
        "zero": spectrum(size, 0 * ones),
    }


@pytest.mark.parametrize("size", [33, 48, 64, 100])
@pytest.mark.parametrize("case", list(cases(2)))
def test_blocks_give_what_torch_gives(size, case):
    matrices = cases(size)[case]
    values, vectors = eigh_by_blocks(matrices)
    scale = torch.linalg.matrix_norm(matrices).clamp_min(torch.finfo(torch.float64).tiny)
    expected = torch.linalg.eigvalsh(matrices)
    assert ((values - expected).abs().amax(-1) <= 1e-13 * scale).all()
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(size).double().expand_as(vectors), rtol=0, atol=1e-12)
    made = (vectors * values[:, None, :]) @ vectors.mT
    assert (torch.linalg.matrix_norm(made - matrices) <= 1e-12 * scale).all()


def test_numbers_need_no_decomposition(monkeypatch):
    monkeypatch.setattr(module.torch.linalg, "eigh", None)
    numbers = torch.tensor([4.0, 0.0, -1.0], dtype=torch.float64)[:, None, None]
    values, vectors = eigh(numbers)
    assert torch.equal(values, numbers[:, 0])
    assert torch.equal(vectors, torch.ones_like(numbers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [1, 2, 32, 33, 64])
def test_a_gpus_are_the_cpus(size):
    for matrices in cases(size).values():
        values, vectors = (one.cpu() for one in eigh(matrices.cuda()))
        scale = torch.linalg.matrix_norm(matrices).clamp_min(torch.finfo(torch.float64).tiny)
        made = (vectors * values[:, None, :]) @ vectors.mT
        assert ((values - torch.linalg.eigvalsh(matrices)).abs().amax(-1) <= 1e-13 * scale).all()
        assert (torch.linalg.matrix_norm(made - matrices) <= 1e-12 * scale).all()
