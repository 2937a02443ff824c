"""`modules_to_save` in float32: their inputs and outputs are in the base's dtype."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from lsr_scale.layers.fp32_modules import cast_modules_to_save
from lsr_scale.planning.sizes import adapter_file_bytes
from tests.helpers.tiny_models import tiny_llama

IDS = torch.arange(5, 17)[None]


def tiny_mixtral():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: tiny_llama(torch.bfloat16), ["self_attn"]),  # keywords, tuples
        (lambda: tiny_llama(torch.bfloat16), ["mlp", "norm"]),
        (lambda: tiny_llama(torch.bfloat16), ["lm_head", "embed_tokens"]),
        (tiny_mixtral, ["gate"]),  # returns a tuple
    ],
    ids=["attention", "mlp", "ends", "router"],
)
def test_the_model_computes_what_it_did_but_for_rounding(build, names):
    torch.manual_seed(0)
    targets = ["up_proj"] if names == ["self_attn"] else ["q_proj"]
    model = get_peft_model(build(), LoraConfig(target_modules=targets, modules_to_save=names)).eval()
    before = model(IDS).logits
    cast_modules_to_save(model)
    cast_modules_to_save(model)  # once is enough
    to_save = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    assert to_save
    assert {parameter.dtype for parameter in to_save} == {torch.float32}
    after = model(IDS).logits
    assert (after - before).float().norm() < 0.05 * before.float().norm()
    after.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in to_save)
    assert adapter_file_bytes(model) > 4 * sum(parameter.numel() for parameter in to_save)
