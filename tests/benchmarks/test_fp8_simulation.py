"""The simulation of FP8 compute that the fused layers are compared with, beside its equations."""

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.speed.fp8_simulation import SimulatedLinear, rounded_rows, rounded_weights, simulated_fp8
from lsr_scale.fused.linear_groups import base_layer


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


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1, attention_bias=True))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=names))


def test_both_products_are_of_rounded_operands_and_adapters_see_none():
    torch.manual_seed(0)
    model = tiny()
    layer = model.get_base_model().model.layers[0]
    v_proj, q_proj = layer.self_attn.v_proj, layer.self_attn.q_proj
    weights = [base_layer(each).weight for each in (q_proj, layer.self_attn.k_proj, v_proj)]
    rounded = rounded_weights([weight.float() for weight in weights])[2]
    torch.nn.init.normal_(v_proj.lora_B.default.weight)
    bias = base_layer(v_proj).bias
    x, grad = torch.randn(5, 32, requires_grad=True), torch.randn(5, 16)
    with simulated_fp8(model, torch.float32):
        assert isinstance(base_layer(v_proj), SimulatedLinear)
        out = v_proj(x)
    out.backward(grad)
    up, down = v_proj.lora_B.default.weight, v_proj.lora_A.default.weight
    scaling = v_proj.scaling["default"]
    assert torch.allclose(out, rounded_rows(x) @ rounded.t() + bias + scaling * x @ down.t() @ up.t(), atol=1e-5)
    assert torch.allclose(x.grad, rounded_rows(grad) @ rounded + scaling * grad @ up @ down, atol=1e-5)
    assert torch.allclose(up.grad, scaling * grad.t() @ (x @ down.t()), atol=1e-5)


def test_afterwards_the_model_is_as_before():
    model = tiny()
    before = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with simulated_fp8(model):
        assert sum(isinstance(module, SimulatedLinear) for module in model.modules()) == 7
    assert [module for module in model.modules() if isinstance(module, torch.nn.Linear)] == before
