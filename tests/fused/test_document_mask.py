"""The mask of packed documents that computes attention itself: as with the dense mask, wherever it is used."""

import pytest
import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

import lsr_scale
from lsr_scale.fused import document_mask
from lsr_scale.fused.document_mask import DocumentMask
from lsr_scale.kernels.attention import Sequences, dense_mask
from tests.fused.test_patching import SAME, TINY_SIZES, adapted, assert_same, results

BOUNDS = torch.tensor([0, 5, 6, 17, 22, 22], dtype=torch.int32)


def masks(window):
    sequences = Sequences(1.0, None, BOUNDS, 11, window)
    return DocumentMask.of(sequences, torch.zeros(2, 11, 8)), dense_mask(2, 11, sequences, torch.device("cpu"))


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
        out = functional.scaled_dot_product_attention(
            *leaves, attn_mask=one[:, :, :, :11], scale=0.3, enable_gqa=kv_heads < 4
        )
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
