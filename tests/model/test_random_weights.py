"""Bases with random weights: reproducible, distributed as the architecture starts, quantized as they are made."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, RobertaConfig

from lsr_scale.model import load_base

CPU = torch.device("cpu")


def tiny_configs():
    small = dict(num_attention_heads=4, num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=96)
    yield LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
    yield GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    yield RobertaConfig(**small, max_position_embeddings=64)


@pytest.mark.parametrize("config", list(tiny_configs()), ids=lambda config: config.model_type)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_random_weights_are_reproducible_and_run(tmp_path, config, quantization, ids):
    config.save_pretrained(tmp_path)
    task = "seq_cls" if config.model_type == "roberta" else "causal_lm"
    first, same, other = (
        load_base(
            str(tmp_path), task=task, quantization=quantization, random_weights=True, seed=seed, dtype=dtype, device=CPU
        )
        for seed, dtype in ((3, "float32"), (3, "float32"), (4, "float32"))
    )
    for model in (first, same, other):
        assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
        assert not any(p.requires_grad for p in model.parameters())
    logits = [model(ids).logits for model in (first, same, other)]
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_random_weights_are_distributed_as_the_architecture_initializes_them(tmp_path):
    config = next(tiny_configs())
    config.save_pretrained(tmp_path)
    model = load_base(str(tmp_path), quantization="nf4", random_weights=True, device=CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert dense.shape == (96, 64)
    assert weight.quant_state.dtype == torch.bfloat16
    assert 0.017 < dense.std() < 0.023
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    made = AutoModelForCausalLM.from_config(config)
    assert torch.equal(model.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq)
    assert model.is_quantized
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.is_trainable
