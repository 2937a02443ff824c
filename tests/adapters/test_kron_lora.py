"""Kron-LoRA: its counts, its resolution of `left_out: auto`, and its equality with PEFT's LoKr where both exist."""

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lsr_scale import KronLoraConfig, UserError
from lsr_scale.adapters.methods.kron_lora import KronLora
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
)


def on_meta(model_class, config, **options):
    with torch.device("meta"):
        model = get_peft_model(model_class(config), KronLoraConfig(**options))
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize(
    ("model_class", "config", "options", "expected"),
    [
        (MistralForCausalLM, MistralConfig(), {"target_modules": SEVEN_LINEARS}, 5_676_032),
        (MistralForCausalLM, MistralConfig(), {"target_modules": [*SEVEN_LINEARS, "lm_head"]}, 5_708_448),
        (LlamaForCausalLM, SMOLLM2, {"target_modules": SEVEN_LINEARS, "left_out": 16}, 683_520),
        (
            DistilBertModel,
            DistilBertConfig(),
            {"target_modules": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]},
            249_120,
        ),
    ],
    ids=["mistral-7b", "mistral-7b-with-head", "smollm2-135m", "distilbert"],
)
def test_published_shapes_give_these_counts_with_nothing_allocated(model_class, config, options, expected):
    model = on_meta(model_class, config, **options)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected


@pytest.mark.parametrize(("hidden", "left_out"), [(4096, 16), (768, 4)])
def test_auto_takes_the_divisor_that_brings_the_block_nearest_200(hidden, left_out):
    config = KronLoraConfig()
    KronLora.prepare_config(config, hidden)
    assert config.left_out == left_out


def test_defaults_are_the_papers():
    config = KronLoraConfig()
    assert (config.rank, config.alpha, config.dropout, config.left_in, config.left_out) == (8, 32, 0.1, 2, "auto")


def test_equals_pefts_lokr_on_the_same_factors(ids):
    shared = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    ours = randomize(
        get_peft_model(
            tiny_llama(torch.float64), KronLoraConfig(rank=2, alpha=3.0, left_in=4, left_out=4, dropout=0.0, **shared)
        )
    )
    lokr = get_peft_model(tiny_llama(torch.float64), LoKrConfig(r=2, alpha=3.0, decompose_factor=4, **shared))
    for layer_name, layer in ours.named_modules():
        if not hasattr(layer, "kron_left"):
            continue
        other = lokr.get_submodule(layer_name)
        with torch.no_grad():
            other.lokr_w1["default"].copy_(layer.kron_left["default"])
            other.lokr_w2_a["default"].copy_(layer.kron_right_up["default"])
            other.lokr_w2_b["default"].copy_(layer.kron_right_down["default"])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(input_ids=ids).logits, lokr.eval()(input_ids=ids).logits, rtol=1e-10, atol=1e-10
        )


def test_the_narrower_of_the_two_exact_forms_is_taken():
    for left_out, left_in, width in [(4, 2, 2 * 3), (2, 4, 2 * 3), (3, 3, 3 * 3)]:
        params = {
            "left": torch.randn(left_out, left_in, dtype=torch.float64),
            "right_up": torch.randn(5, 3, dtype=torch.float64),
            "right_down": torch.randn(3, 7, dtype=torch.float64),
        }
        down, up = KronLora.materialize(params)
        assert down.shape == (width, left_in * 7)
        assert up.shape == (left_out * 5, width)
        torch.testing.assert_close(up @ down, KronLora.delta_weight(params), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((5, 8), {}, "left_in=2 must divide in_features=5.*left_in_pattern"),
        ((8, 9), {"left_out": 4}, r"left_out=4 must divide out_features=9.*one of \[1, 3, 9\]"),
        ((8, 8), {"left_out": 4}, "rank=8 is larger than the smaller dimension of the right factor, 4 -> 2"),
    ],
)
def test_impossible_splits_say_what_to_set(sizes, options, message):
    with pytest.raises(UserError, match=message):
        KronLora.parameter_shapes(*sizes, KronLoraConfig(**options))


def test_loras_own_counts_stand_beside():
    def count(model_class, config, targets, rank):
        with torch.device("meta"):
            model = get_peft_model(model_class(config), LoraConfig(r=rank, target_modules=targets))
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert count(MistralForCausalLM, MistralConfig(), SEVEN_LINEARS, 8) == 20_971_520
    assert count(MistralForCausalLM, MistralConfig(), [*SEVEN_LINEARS, "lm_head"], 8) == 21_260_288
    assert count(LlamaForCausalLM, SMOLLM2, SEVEN_LINEARS, 8) == 2_442_240
    assert count(DistilBertModel, DistilBertConfig(n_layers=1), ["q_lin"], 8) == 12_288
