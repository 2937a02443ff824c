"""The adapter is switched off for the reference's pass by a flag a layer, with what PEFT's own switch makes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lsr_scale import LsrConfig
from lsr_scale.training.reference import REFERENCE, set_reference
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama

IDS = torch.arange(12).view(2, 6)


def policy(config):
    """Return a model whose reference is its base, as a trainer would have made it."""
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter(REFERENCE, config)
    set_reference(model, starts_from_adapter=False)
    return randomize(model)


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=SEVEN_LINEARS),
    "lsr": LsrConfig(rank=4, separation_rank=2, target_modules=SEVEN_LINEARS),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_base_answers_while_the_adapter_is_off(name):
    model = policy(CONFIGS[name])
    base = tiny_llama()(IDS).logits
    adapted = model(IDS).logits
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base)
            with model.disable_adapter():
                assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, adapted)
    assert not torch.allclose(adapted, base)
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert isinstance(model, PeftModel)
    assert model.get_model_status().enabled is True


def test_an_error_switches_it_on_again():
    model = policy(CONFIGS["lsr"])
    with pytest.raises(ValueError, match="stop"), model.disable_adapter():
        raise ValueError("stop")
    assert model.get_model_status().enabled is True
    assert not model._adapters_disabled


def test_the_switch_walks_over_the_modules_once(monkeypatch):
    model, walks = policy(CONFIGS["lora"]), []
    modules = type(model).modules
    monkeypatch.setattr(type(model), "modules", lambda self: walks.append(1) or modules(self))
    for _ in range(3):
        with model.disable_adapter():
            pass
    assert len(walks) == 1
