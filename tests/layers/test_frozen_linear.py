"""The frozen bitsandbytes layers: the same numbers as bitsandbytes', and nothing kept alive for the backward pass."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lsr_scale import UserError
from lsr_scale.kernels.fp8 import E4M3, power_of_two_scale
from lsr_scale.kernels.hadamard import hadamard_matrix
from lsr_scale.layers import frozen_linear
from lsr_scale.layers.frozen_linear import (
    FrozenLinear4bit,
    FrozenLinear8bit,
    dequantize,
    dequantize_fp8,
    dequantize_rotated,
    freeze_quantized,
    largest_magnitude,
    rotated_row_scales,
)
from tests.helpers.tiny_models import quantize, tiny_llama


def make(kind, in_features=64, out_features=48, bias=True):
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(in_features, out_features, bias=bias)), kind)[0]


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
def test_four_bits_are_bit_equal_to_bitsandbytes_forward_and_backward(kind):
    stock, ours = make(kind).train(), make(kind).train()
    stock.support_avx512bf16_for_cpu = False
    assert freeze_quantized(ours) == 1
    assert type(ours) is FrozenLinear4bit
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    results = []
    for layer in (stock, ours):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.float().square().sum().backward()
        results.append((out, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_int8_is_weight_only_with_activations_untouched():
    layer = make("int8")
    freeze_quantized(layer)
    assert type(layer) is FrozenLinear8bit
    weight = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    torch.testing.assert_close(dequantize(layer, torch.float64), weight, rtol=1e-6, atol=1e-9)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), (x.double() @ weight.T + layer.bias.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_activation_and_no_weight_is_saved_for_backward(kind):
    layer = make(kind)
    freeze_quantized(layer)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = layer(torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True))
    assert saved == []
    context = out.grad_fn
    while not hasattr(context, "layer"):
        context = context.next_functions[0][0]
    saved = [value for value in vars(context).values() if isinstance(value, torch.Tensor)]
    assert saved == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_after_evaluation_keeps_its_gradient(kind):
    layer = make(kind)
    freeze_quantized(layer)
    with torch.no_grad():
        before = layer.eval()(torch.ones(1, 64, dtype=torch.bfloat16))
    x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    after = layer.train()(x)
    after.float().sum().backward()
    assert torch.equal(before, after)
    expected = dequantize(layer, torch.bfloat16).float().sum(0)
    torch.testing.assert_close(x.grad.float()[0], expected, rtol=2e-2, atol=2e-2)


def test_a_repacked_or_unquantized_weight_is_refused_with_the_remedy():
    layer = make("nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    freeze_quantized(layer)
    with pytest.raises(UserError, match="repacked for CPU inference"):
        layer(torch.ones(1, 64))
    fresh = bnb.nn.Linear4bit(64, 48)
    freeze_quantized(fresh)
    with pytest.raises(UserError, match="not quantized yet"):
        fresh(torch.ones(1, 64))


def test_a_model_is_frozen_in_place_and_int8_codes_have_one_owner():
    model = quantize(tiny_llama(), "int8")
    assert freeze_quantized(model) == 14 == freeze_quantized(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.CB is None
    assert layer.state.CB is None
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    moved = layer.to("cpu")
    assert moved.weight.SCB is not None
    assert "SCB" in moved.state_dict()


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
@pytest.mark.parametrize("in_features", [48, 64, 96, 160])
def test_blocks_that_go_over_the_end_of_a_row_are_dequantized_right(kind, in_features):
    torch.manual_seed(0)
    dense = torch.randn(32, in_features) * torch.rand(32, 1)  # rows of different sizes tell blocks apart
    linear = nn.Linear(in_features, 32, bias=False)
    linear.weight.data.copy_(dense)
    layer = quantize(nn.Sequential(linear), kind, torch.float32)[0]
    freeze_quantized(layer)
    assert (dequantize(layer, torch.float32) - dense).norm() / dense.norm() < 0.16


def make_any(kind, in_features=64, out_features=48, dtype=torch.float32):
    """Return a frozen layer, also of a plain kind, whose float32 values `dequantize` gives."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features)
    linear.weight.data *= torch.rand(out_features, 1)
    if kind == "plain":
        return linear.to(dtype)
    layer = quantize(nn.Sequential(linear), kind, dtype)[0]
    freeze_quantized(layer)
    return layer


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8", "plain"])
@pytest.mark.parametrize("in_features", [64, 96])
def test_a_layer_in_e4m3_is_its_float32_weight_rounded_once_in_both_orientations(kind, in_features):
    layer = make_any(kind, in_features)
    values = dequantize(layer, torch.float32)
    scale = power_of_two_scale(largest_magnitude(layer))
    expected = (values / scale).to(E4M3).float()
    group = torch.zeros(64, in_features, dtype=E4M3)
    dequantize_fp8(layer, group[16:], scale, transposed=False)
    assert torch.equal(group[16:].float(), expected)
    assert not group[:16].float().any()
    group = torch.zeros(in_features, 64, dtype=E4M3)
    dequantize_fp8(layer, group[:, 16:], scale, transposed=True)
    assert torch.equal(group[:, 16:].float(), expected.t())
    assert not group[:, :16].float().any()
    assert (expected * scale - values).norm() / values.norm() < 0.03


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_layer_that_computes_in_bfloat16_is_not_rounded_to_it_first(kind):
    exact, layer = make_any(kind), make_any(kind)
    if kind != "int8":
        layer.weight.quant_state.dtype = torch.bfloat16
        assert not torch.equal(dequantize(layer, torch.float32), dequantize(exact, torch.float32))
    outs = [torch.empty(48, 64, dtype=E4M3) for _ in range(2)]
    for each, out in zip((exact, layer), outs, strict=True):
        dequantize_fp8(each, out, torch.tensor([2.0**-10]), transposed=False)
    assert torch.equal(outs[0].float(), outs[1].float())


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8", "plain"])
@pytest.mark.parametrize("in_features", [64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_rotated_int8_is_its_bfloat16_weight_rotated_and_rounded_once(kind, in_features, dtype, monkeypatch):
    layer = make_any(kind, in_features, dtype=dtype)
    weight = dequantize(layer, torch.float32).bfloat16().double()
    matrix = hadamard_matrix(weight.device, torch.float64)
    rotated = (weight.view(48, -1, 64) @ matrix / 8).view(48, in_features)
    # chunks of rows, the last one partial; autocast, which would round them
    monkeypatch.setattr(frozen_linear, "_ROTATED_VALUES", in_features * 10)
    with torch.autocast("cpu", torch.bfloat16):
        scales = rotated_row_scales(layer)
        group = torch.full((64, in_features), 99, dtype=torch.int8)
        dequantize_rotated(layer, group[16:], scales)
    assert (scales.dtype, scales.shape) == (torch.float32, (48,))
    torch.testing.assert_close(scales.double(), rotated.abs().amax(1) / 127, rtol=1e-6, atol=0)
    codes = group[16:].double()
    assert (codes - rotated / scales[:, None]).abs().max() < 0.5001
    assert (codes.abs().amax(1) == 127).all()
    assert (group[:16] == 99).all()
    assert (codes * scales[:, None] - rotated).norm() / rotated.norm() < 0.015


def test_rotated_int8_of_a_layer_without_data_or_quantization():
    with FakeTensorMode():
        layer = nn.Linear(64, 48)
        scales, out = rotated_row_scales(layer), torch.empty(48, 64, dtype=torch.int8)
        dequantize_rotated(layer, out, scales)
        assert (scales.dtype, scales.shape) == (torch.float32, (48,))
    layer = bnb.nn.Linear4bit(64, 48)
    with pytest.raises(UserError, match="not quantized yet"):
        rotated_row_scales(layer)
    with pytest.raises(UserError, match="not quantized yet"):
        dequantize_rotated(layer, torch.empty(48, 64, dtype=torch.int8), torch.ones(48))


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8", "plain"])
def test_the_largest_magnitude_is_read_off_the_scales(kind):
    for sign in (1, -1):
        layer = make_any(kind)
        if kind == "plain":
            layer.weight.data[3, 5] = 2.0 * sign
            layer.bfloat16()
        largest = largest_magnitude(layer)
        assert largest.dtype == torch.float32
        assert largest.shape == (1,)
        torch.testing.assert_close(largest[0], dequantize(layer, torch.float32).abs().max(), rtol=1e-6, atol=0)
    if kind == "plain":
        layer.weight.data[0, 0] = torch.nan
        assert largest_magnitude(layer).isnan()
    elif kind != "int8":
        with pytest.raises(UserError, match="not quantized yet"):
            largest_magnitude(bnb.nn.Linear4bit(64, 48))
