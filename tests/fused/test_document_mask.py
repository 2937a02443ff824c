"""The mask of packed documents that computes attention itself: as with the dense mask, wherever it is used."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

import lsr_scale
from lsr_scale.fused import document_mask
from lsr_scale.fused.document_mask import DocumentMask
from lsr_scale.kernels import attention
from lsr_scale.kernels.attention import Sequences, dense_mask
from tests.fused.test_patching import SAME, TINY_SIZES, adapted, assert_same, results
from tests.helpers import interpreter

BOUNDS = torch.tensor([0, 5, 6, 17, 22, 22], dtype=torch.int32)


def masks(window, device="cpu", rows=2):
    sequences = Sequences(1.0, None, BOUNDS.clamp(max=11 * rows).to(device), 11, window)
    mask = DocumentMask.of(sequences, torch.zeros(rows, 11, 8, device=device))
    return mask, dense_mask(rows, 11, sequences, torch.device(device))


@pytest.fixture(params=[False, True], ids=["dense", "by documents"])
def computed(request, monkeypatch):
    """Return the calls of our attention, which on a CPU is not chosen."""
    calls = []
    run = document_mask.attention
    monkeypatch.setattr(document_mask, "attention", lambda *args: (calls.append(1), run(*args))[1])
    if request.param:
        monkeypatch.setattr(document_mask, "choose_backend", lambda *_: "packed")
    yield calls
    assert bool(calls) == request.param


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_attends_as_the_dense_mask_does(kv_heads, window, computed):
    mask, dense = masks(window)
    q, k, v, grad = torch.randn(4, 2, 4, 11, 16, dtype=torch.float64)
    inputs = q, k[:, :kv_heads], v[:, :kv_heads]
    found = []
    for one in (mask, dense):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = functional.scaled_dot_product_attention(*leaves, attn_mask=one, scale=0.3, enable_gqa=kv_heads < 4)
        assert type(out) is torch.Tensor
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    torch.testing.assert_close(*found)


def test_dropout_of_attention_has_the_dense_mask(monkeypatch):
    monkeypatch.setattr(document_mask, "choose_backend", lambda *_: "packed")
    monkeypatch.setattr(document_mask, "attention", None)
    mask, dense = masks(None)
    q = torch.randn(2, 4, 11, 16)
    one, other = (
        (torch.manual_seed(0), functional.scaled_dot_product_attention(q, q, q, attn_mask=m, dropout_p=0.5))[1]
        for m in (mask, dense)
    )
    assert torch.equal(one, other)


def test_whatever_else_reads_it_gets_the_dense_mask():
    mask, dense = masks(3)
    assert (mask.dtype, mask.device, mask.ndim) == (dense.dtype, dense.device, dense.ndim)
    scores = torch.randn(2, 4, 11, 11)
    assert torch.equal(torch.where(mask, scores, -1e9), torch.where(dense, scores, -1e9))
    assert torch.equal(scores.masked_fill(~mask, 0.0), scores.masked_fill(~dense, 0.0))
    assert torch.equal(mask.float() + scores, dense.float() + scores)
    assert mask.shape == mask.size() == dense.shape
    assert mask.mT.shape == mask.data.shape == dense.shape
    assert torch.equal(torch.cat([mask, mask]), torch.cat([dense, dense]))
    assert torch.equal(scores[:, :1][mask], scores[:, :1][dense])
    for index in (1, (slice(None), 0, slice(2, 5)), (..., slice(None, 7))):
        assert torch.equal(mask[index], dense[index])


def test_a_copy_is_the_dense_mask():
    mask, dense = masks(3)
    for copied in (copy.deepcopy({"mask": [mask]})["mask"][0], pickle.loads(pickle.dumps(mask)), mask.clone()):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, dense)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_that_run_unfused_on_packed_rows(recompute, ids, computed):
    config = MistralConfig(**{**TINY_SIZES, "sliding_window": 4})
    packed, positions = ids.reshape(1, -1), torch.tensor([[*range(5), *range(11), *range(6)]])
    torch.manual_seed(0)
    model = adapted(MistralForCausalLM(config).double())
    model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    expected = results(model, packed, position_ids=positions)
    lsr_scale.fuse(model, recompute)
    assert_same(results(model, packed, position_ids=positions), expected, SAME)


@pytest.fixture
def kernels(monkeypatch, device):
    """Have the kernels for packed documents compute attention, also on a CPU; return where."""
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    interpreter.as_on_a_gpu(monkeypatch)
    for module in (document_mask, attention):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "packed")
    return device


def heads_first(*shapes, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def computed_with(mask, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = functional.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def test_kernels_take_whatever_layout_heads_have(kernels):
    mask, dense = masks(3, kernels)
    q, k, v, grad = heads_first((2, 4, 11, 16), (2, 2, 16, 11), (2, 2, 11, 32), (2, 4, 16, 11), device=kernels)
    inputs = [q, k.mT, v[..., ::2]]
    for one, other in zip(*(computed_with(m, inputs, grad.mT) for m in (mask, dense)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_kernels_do_not_take_has_the_dense_mask(kernels, monkeypatch):
    monkeypatch.setattr(document_mask, "attention", None)
    q, k, narrow, grad = heads_first((2, 4, 11, 16), (2, 2, 11, 16), (2, 2, 11, 8), (2, 4, 11, 16), device=kernels)
    for rows, inputs in (
        (2, (q, k, narrow)),
        (2, (q, k[:1], k[:1])),  # every row has one row's keys
        (1, (q, k, k)),  # and one row's documents
    ):
        mask, dense = masks(3, kernels, rows)
        given, expected = (computed_with(m, inputs, grad[..., : inputs[2].shape[3]]) for m in (mask, dense))
        torch.testing.assert_close(given, expected)
