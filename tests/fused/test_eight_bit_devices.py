"""8 bits of a model with a device map, whose layers have a forward of accelerate's, and of layers on several GPUs."""

import pytest
import torch
from accelerate import dispatch_model

import lsr_scale
from lsr_scale.errors import UserError
from lsr_scale.fused import compute_errors, eight_bit
from lsr_scale.fused.layer_state import GROUPS
from tests.fused.test_eight_bit import ALL_GROUPS, adapted


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Let FP8 run on the CPU, by the kernels' references."""
    monkeypatch.setattr(eight_bit, "fp8_fallback_reason", lambda device: None)


def mapped(layers):
    """Return a model some of whose layers accelerate calls, as it does to move inputs to a layer's device."""
    model = adapted()
    decoder = model.get_base_model().model
    for layer in layers:
        dispatch_model(decoder.layers[layer], {"": "cpu"}, main_device="cpu", force_hooks=True)
    return model


def test_a_device_map_is_refused_in_words():
    with pytest.raises(UserError, match=r"fp8 is for fused layers, and none can run fused: .*\(a device map or"):
        lsr_scale.fuse(mapped([0, 1]), compute="fp8")


def test_layers_that_accelerate_calls_are_not_counted(ids):
    model = mapped([1])
    report = lsr_scale.fuse(model, compute="int8", calibrate=True)
    assert report.eight_bit == [f"0.{name}" for name in GROUPS]
    assert report.not_eight_bit.keys() == {f"1.{name}" for name in GROUPS}
    assert "4 of 8 groups of linears compute in 8 bits (the others cannot: " in str(report)
    assert "(a device map or a patch)" in str(report)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {name.partition(".")[0] for name in compute_errors(model)} == {"0"}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_errors_of_layers_on_two_gpus(ids):
    model = adapted().cuda()
    lsr_scale.fuse(model, compute="fp8", calibrate=True)
    model(input_ids=ids.cuda(), labels=ids.cuda(), use_cache=False).loss.backward()
    for state in model.get_base_model().model.layers[1].eight_bit.values():
        state.errors = {name: error.to("cuda:1") for name, error in state.errors.items()}
    errors = compute_errors(model)
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in errors)) == ALL_GROUPS
    assert all(0.01 < error < 0.08 for error in errors.values()), errors
