"""Cross-entropy and its gradient in place."""

import pytest
import torch
from torch.nn import functional

from lsr_scale.kernels import cross_entropy as module
from tests.kernels.checks import assert_close_to_float64, compile_for, poisoned


def inputs(rows: int, vocabulary: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    wide = poisoned((rows, vocabulary + 8), dtype, device)
    wide[:, :vocabulary] = logits.to(dtype)
    return wide, wide[:, :vocabulary], labels.to(device)


def exact(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().double().requires_grad_()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), logits.grad


@pytest.mark.parametrize("run", [module.cross_entropy_reference, module.cross_entropy_triton])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 8), (3, 1000), (5, 9000)])
def test_losses_and_gradient(run, rows, vocabulary, device):
    if run is module.cross_entropy_triton:
        pytest.importorskip("triton", reason="Triton is not installed")
    wide, logits, labels = inputs(rows, vocabulary, torch.float32, device)
    losses, gradient = exact(logits, labels)
    assert torch.allclose(run(logits, labels, gradient=False).double(), losses, rtol=1e-5)
    assert torch.allclose(exact(logits, labels)[0], losses), "without a gradient logits stay"
    assert torch.allclose(run(logits, labels, gradient=True).double(), losses, rtol=1e-5)
    assert torch.allclose(logits.double(), gradient, atol=1e-6)
    assert wide[:, vocabulary:].isnan().all()


@pytest.mark.parametrize("run", [module.cross_entropy_reference, module.cross_entropy_triton])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 8), (3, 1000), (5, 9000)])
def test_entropies_come_with_either(run, rows, vocabulary, device):
    if run is module.cross_entropy_triton:
        pytest.importorskip("triton", reason="Triton is not installed")
    _, logits, labels = inputs(rows, vocabulary, torch.float32, device)
    logits[:, 1] = -torch.inf  # what a model rules out
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    losses, gradient = exact(logits, labels.clamp_min(2))
    for asked in (False, True):
        entropies = torch.full((rows,), torch.nan, device=device)
        actual = run(logits, labels.clamp_min(2), gradient=asked, entropies=entropies)
        assert torch.allclose(entropies.double(), expected, rtol=1e-5)
        assert torch.allclose(actual.double(), losses, rtol=1e-5)
    assert torch.allclose(logits.double(), gradient, atol=1e-6)


def test_float64_reference_is_exact():
    _, logits, labels = inputs(4, 50, torch.float64, "cpu")
    losses, gradient = exact(logits, labels)
    assert torch.allclose(module.cross_entropy(logits, labels, gradient=True), losses, rtol=1e-13)
    assert torch.allclose(logits, gradient, atol=1e-14)


def test_large_logits_do_not_overflow(device):
    logits = torch.tensor([[500.0, -500.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    losses = module.cross_entropy_triton(logits, torch.tensor([1], device=device), gradient=True)
    assert losses.item() == 1000
    assert logits[0, :3].tolist() == [1, -1, 0]


def test_no_rows(device):
    logits, labels = torch.empty(0, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert module.cross_entropy_triton(logits, labels, gradient=True).shape == (0,)


def test_compiles_for_sm80_and_sm90():
    signature = dict(
        logits="*bf16", labels="*i64", losses="*fp32", entropies="*fp32", vocabulary="i32", row_stride="i64"
    )
    for metadata in compile_for(
        module._cross_entropy_kernel, signature, dict(GRADIENT=True, ENTROPY=True, STEPS=8, BLOCK=4096), num_warps=8
    ).values():
        assert metadata.shared <= 16 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("vocabulary", [32000, 49152, 128256])
def test_bfloat16_on_a_gpu(vocabulary):
    _, logits, labels = inputs(300, vocabulary, torch.bfloat16, "cuda")
    losses, gradient = exact(logits, labels)
    eager = logits.clone()
    eager_losses = module.cross_entropy_reference(eager, labels, gradient=True)
    actual = module.cross_entropy(logits, labels, gradient=True)
    assert_close_to_float64(actual, losses, eager_losses, 1e-6)
    assert_close_to_float64(logits, gradient, eager, 1e-4)


def test_a_label_outside_the_vocabulary_is_not_a_number(device):
    logits, labels = torch.zeros(3, 8, device=device), torch.tensor([8, -1, 2], device=device)
    losses = module.cross_entropy_triton(logits, labels, gradient=False)
    assert losses.isnan().tolist() == [True, True, False]
