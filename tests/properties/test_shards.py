"""A frozen matrix over any number of processes: its shards side by side are the matrix, bit for bit, whatever it is."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized
from lsr_scale.model.shard import Sharding, full_numel, full_shape
from tests.helpers.hypothesis_settings import bounded
from tests.helpers.tiny_models import quantize

KINDS = ["nf4", "nf4-single", "fp4", "int8", "bfloat16", "float32"]


def linear(into, out, kind):
    """Return a model of one linear layer of random weights, held as the base of a run is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(into, out))
    if kind in ("bfloat16", "float32"):
        return model.to(getattr(torch, kind))
    quantize(model, kind)
    freeze_quantized(model)
    return model


def shard_of(model, rank, world_size, offload):
    """Return what a process of so many keeps of a model's matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world_size))
        sharding = Sharding(offload=offload)
        with sharding.loading() as rest:
            rest(model)
    return model[0].weight


@pytest.mark.parametrize("kind", KINDS)
@bounded(25)
@given(into=st.integers(1, 70), out=st.integers(1, 40), world_size=st.integers(1, 9), offload=st.booleans())
def test_shards_side_by_side_are_the_matrix(kind, into, out, world_size, offload):
    whole = linear(into, out, kind)
    before = whole[0].weight.data.clone()
    expected = dequantize(whole[0], torch.float32)
    copies = [copy.deepcopy(whole) for _ in range(world_size)]
    weights = [shard_of(model, rank, world_size, offload) for rank, model in enumerate(copies)]
    if world_size == 1 and not offload:
        assert torch.equal(weights[0].data, before), "alone a process keeps all"
        return
    shards = [weight.shard for weight in weights]
    for weight, shard in zip(weights, shards, strict=True):
        assert weight.numel() == 0, "nothing is held but the shard"
        assert (full_numel(weight), full_shape(weight)) == (before.numel(), before.shape)
        assert (shard.numel(), shard.numel() % 16) == (shards[0].numel(), 0)
    joined = torch.cat(shards)
    assert joined.numel() < before.nbytes + 16 * world_size, "no more than what rounding up needs"
    assert not joined[before.nbytes :].any()
    codes = joined[: before.nbytes].view(before.dtype).view(before.shape)
    assert torch.equal(codes.view(torch.uint8), before.view(torch.uint8))
    weights[-1].data = codes
    assert torch.equal(dequantize(copies[-1][0], torch.float32), expected)


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8"])
@bounded(25)
@given(into=st.integers(1, 70), out=st.integers(1, 40))
def test_dequantized_weights_are_code_times_scale_in_any_shape(kind, into, out):
    layer = linear(into, out, kind)[0]
    found = dequantize(layer, torch.float32)
    if kind == "int8":
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        expected = layer.weight.data.double() * scales.double()[:, None] / 127
    else:
        state = layer.weight.quant_state
        absmax = state.absmax.double()
        if state.nested:
            inner = state.state2
            blocks = torch.arange(len(absmax)) // inner.blocksize
            absmax = inner.code.double()[state.absmax.long()] * inner.absmax.double()[blocks] + state.offset.double()
        packed = layer.weight.data.reshape(-1).view(torch.uint8).long()
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: into * out]
        values = state.code.double()[codes] * absmax[torch.arange(into * out) // state.blocksize]
        expected = values.view(out, into)
    # a bfloat16 layer's values pass through bfloat16 in bitsandbytes' own kernel
    torch.testing.assert_close(found.double(), expected, rtol=2**-8 if kind != "int8" else 1e-6, atol=1e-6)
