"""Copies of a base's modules over the same tensors."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lsr_scale.adapters.inject import inject
from lsr_scale.layers.frozen_linear import FrozenLinear4bit, FrozenLinear8bit, freeze_quantized
from lsr_scale.model.share import share_base
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama

KINDS = ["none", "nf4", "nf4-single", "int8"]


def base_of(kind: str) -> nn.Module:
    """Return a frozen base as `load_base` leaves it."""
    model = tiny_llama() if kind == "none" else quantize(tiny_llama(), kind, torch.float32)
    freeze_quantized(model)
    return model.requires_grad_(False)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of a model by its name: parameters, buffers, the scales of quantized weights."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, weight in list(found.items()):
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = {} if state.state2 is None else {"offset": state.offset, "nested": state.state2.absmax}
            found |= {f"{name}.{key}": value for key, value in {"absmax": state.absmax, **nested}.items()}
        if getattr(weight, "SCB", None) is not None:
            found[f"{name}.SCB"] = weight.SCB
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_copied_and_the_function_is_the_same(kind, ids):
    base = base_of(kind)
    copied = share_base(base)
    own, other = tensors(base), tensors(copied)
    assert own.keys() == other.keys()
    assert all(own[name] is value for name, value in other.items())
    # what modules refer to beside their parameters
    for one, two in zip(base.modules(), copied.modules(), strict=True):
        assert one is not two
        assert type(one) is type(two)
        if isinstance(one, FrozenLinear4bit):
            assert one.quant_state is two.quant_state
        if isinstance(one, FrozenLinear8bit):
            assert one.state is not two.state
            assert one.state.SCB is two.state.SCB
    assert torch.equal(base(input_ids=ids).logits, copied(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_one_copy_leaves_the_others_untouched(kind, ids):
    base = base_of(kind)
    copied = share_base(base)
    expected, modules = base(input_ids=ids).logits, [type(module) for module in base.modules()]
    adapted = randomize(inject(copied, "lsr", {"rank": 4, "target_modules": SEVEN_LINEARS}, "causal_lm")).train()
    assert not torch.allclose(adapted(input_ids=ids).logits, expected)
    assert [type(module) for module in base.modules()] == modules
    assert torch.equal(base(input_ids=ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    second = inject(share_base(base), "lora", {"rank": 2, "target_modules": ["q_proj"]}, "causal_lm")
    assert torch.equal(second(input_ids=ids).logits, expected)  # lora_B is zero


def test_tied_embeddings_stay_tied():
    base = tiny_llama(tie_word_embeddings=True).requires_grad_(False)
    copied = share_base(base)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight is base.lm_head.weight


def test_configuration_and_mode_are_the_copys_own():
    base = tiny_llama()
    copied = share_base(base)
    assert copied.config.to_dict() == base.config.to_dict()
    copied.config.use_cache = not base.config.use_cache
    copied.train(not base.training)
    assert copied.config.use_cache is not base.config.use_cache
    assert copied.model.config is copied.config
    assert copied.training is not base.training


def test_hooks_are_copied_and_bound_to_the_copies(ids):
    base = tiny_llama()
    seen = []

    class Watch(nn.Linear):
        def watch(self, module, args, output):
            seen.append(self)

    base.lm_head.__class__ = Watch
    base.lm_head.register_forward_hook(Watch.watch.__get__(base.lm_head))
    copied = share_base(base)
    copied(input_ids=ids)
    assert seen == [copied.lm_head]


def test_a_model_of_conv1d_layers_is_shared():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    own, other = tensors(base), tensors(share_base(base))
    assert all(own[name] is value for name, value in other.items())
