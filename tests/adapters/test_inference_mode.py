"""Models loaded, run and trained in and out of `torch.inference_mode`, whose tensors count no changes."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.layers.frozen_linear import freeze_quantized
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama


def base(kind):
    model = tiny_llama() if kind is None else quantize(tiny_llama(), kind, torch.float32)
    freeze_quantized(model)
    return model


def adapted(kind, method):
    options = {"target_modules": SEVEN_LINEARS, "rank": 2}
    return randomize(get_peft_model(base(kind), peft_config(method, options, "CAUSAL_LM")))


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "method"), [(None, "lsr"), ("nf4", "lsr"), ("int8", "kron_lora"), ("nf4", "lora")])
def test_a_model_that_is_loaded_in_inference_mode(kind, method, fused, ids, tmp_path):
    model = adapted(kind, method).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logits(model, ids)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(base(kind), tmp_path).eval()
        if fused:
            lsr_scale.fuse(loaded, cache_weights=True)
        for _ in range(2):
            torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)
        factor = next(p for name, p in loaded.named_parameters() if "q_proj" in name and "default" in name)
        factor.mul_(3.0)
        assert not torch.allclose(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4), "a change went unnoticed"
        factor.div_(3.0)
        assert loaded.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == 13
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hold", [False, True])
def test_training_after_an_evaluation_in_inference_mode(hold, ids):
    model, other = adapted("nf4", "lsr"), adapted("nf4", "lsr")
    for each in (model, other):
        lsr_scale.fuse(each, cache_weights=hold)
    with torch.inference_mode():
        logits(model.eval(), ids)
    for each in (model, other):
        each.train()(input_ids=ids, labels=ids).loss.backward()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for (_, one), two in pairs if one.requires_grad)
    with torch.inference_mode():
        torch.testing.assert_close(logits(model.eval(), ids), logits(other.eval(), ids))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
def test_a_bank_loads_adapters_in_and_out_of_inference_mode(made_in, fused, ids, tmp_path):
    expected = []
    for row, name in enumerate(("anna", "ben")):
        model = randomize(adapted(None, "lsr"), seed=row).eval()
        model.save_pretrained(tmp_path / name)
        expected.append(logits(model, ids)[row])
    with made_in():
        model = adapted(None, "lsr").eval()
        if fused:
            lsr_scale.fuse(model)
        bank = lsr_scale.AdapterBank(model, tmp_path, 0.1)
    for mode, name in ((torch.no_grad, "anna"), (torch.inference_mode, "ben")):
        with mode():
            bank.load(name)
            actual = model(input_ids=ids, use_cache=False, adapter_names=["anna", "ben"]).logits
            torch.testing.assert_close(actual, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
