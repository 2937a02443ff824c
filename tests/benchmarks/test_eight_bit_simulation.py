"""The simulation of products in 8 bits that fused layers are compared with, beside its equations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.speed.eight_bit_simulation import (
    SimulatedLinear,
    rotated_rows,
    rounded_rows,
    rounded_weights,
    simulated,
)
from lsr_scale.fused.linear_groups import base_layer
from lsr_scale.kernels.hadamard import rotate_reference


def test_a_row_is_rounded_to_four_bits_by_a_scale_of_its_own():
    # 1 + 1/16 and 1 + 3/16 lie in the middle of two values of e4m3; ties go to the even one
    x = torch.tensor([[1.0625, 1.1875, -1.75, 0.0], [1.0625e3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, 1.25, -1.75, 0.0], [1024.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(rounded_rows(x), expected)
    # 1.75 gets the code 448, so what is below 2^-18 underflows: 2^-18 is half of the smallest subnormal, 2^-9 / 256
    small = torch.tensor([[1.75, 2.0**-17, 2.0**-19, 0.75 * 2.0**-17]])
    assert torch.equal(rounded_rows(small), torch.tensor([[1.75, 2.0**-17, 0.0, 2.0**-17]]))


def test_linears_that_share_an_input_share_a_scale():
    large, small = torch.tensor([[1.75]]), torch.tensor([[2.0**-19]])
    assert torch.equal(rounded_weights([small])[0], small)
    assert torch.equal(rounded_weights([large, small])[1], torch.zeros(1, 1))


def test_a_row_in_int8_is_rotated_and_its_largest_value_is_127():
    x = torch.zeros(3, 2, 64)
    x[0, 0, 0], x[0, 1, 63] = 127 * 8, 4.0
    # every value of the rotated row is that of H / 8, a multiple of 1 / 127 of the largest
    assert torch.equal(rotated_rows(x)[0, 0], torch.full((64,), 127.0))
    assert torch.equal(rotated_rows(x)[2], torch.zeros(2, 64))
    wide = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    rotated = rotate_reference(wide)
    steps = rotated.abs().amax(1, keepdim=True) / 127
    errors = (rotated_rows(wide) - rotated).abs() / steps
    assert 0.4 < errors.max() < 0.501
    # what is rounded to bfloat16 first is rounded twice
    assert torch.equal(rotated_rows(wide * (1 + 2.0**-12)), rotated_rows(wide))


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1, attention_bias=True))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=names))


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_both_products_are_of_rounded_operands_and_adapters_see_none(compute):
    torch.manual_seed(0)
    model = tiny()
    layer = model.get_base_model().model.layers[0]
    v_proj, q_proj = layer.self_attn.v_proj, layer.self_attn.q_proj
    weights = [base_layer(each).weight for each in (q_proj, layer.self_attn.k_proj, v_proj)]
    rounded = rounded_weights([weight.float() for weight in weights])[2]
    torch.nn.init.normal_(v_proj.lora_B.default.weight)
    bias = base_layer(v_proj).bias
    x, grad = torch.randn(5, 64, requires_grad=True), torch.randn(5, 32)
    with simulated(model, compute, torch.float32):
        assert isinstance(base_layer(v_proj), SimulatedLinear)
        out = v_proj(x)
    out.backward(grad)
    up, down = v_proj.lora_B.default.weight, v_proj.lora_A.default.weight
    scaling = v_proj.scaling["default"]
    product = rounded_rows(x) @ rounded.t()
    if compute == "int8":
        product = rotated_rows(x) @ rotated_rows(weights[2]).t()
    assert torch.allclose(out, product + bias + scaling * x @ down.t() @ up.t(), atol=1e-5)
    assert torch.allclose(x.grad, rounded_rows(grad) @ rounded + scaling * grad @ up @ down, atol=1e-5)
    assert torch.allclose(up.grad, scaling * grad.t() @ (x @ down.t()), atol=1e-5)


def test_afterwards_the_model_is_as_before():
    model = tiny()
    before = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with simulated(model, "fp8"):
        assert sum(isinstance(module, SimulatedLinear) for module in model.modules()) == 7
    assert [module for module in model.modules() if isinstance(module, torch.nn.Linear)] == before
