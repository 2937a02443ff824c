"""Injection by target names into every supported architecture, random weights: it finds them, trains, and reloads."""

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.adapters.peft import AdapterLinear
from tests.helpers.tiny_models import SEVEN_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
BERT_LIKE = {**SIZES, "vocab_size": 64}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA_LIKE), SEVEN_LINEARS, 14),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**LLAMA_LIKE), SEVEN_LINEARS, 14),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**LLAMA_LIKE), SEVEN_LINEARS, 14),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**LLAMA_LIKE, head_dim=12), SEVEN_LINEARS, 14),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig(**LLAMA_LIKE, head_dim=12), SEVEN_LINEARS, 14),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**BERT_LIKE), ["query", "value"], 4),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**BERT_LIKE), ["query", "value"], 4),
    "mpnet": (tf.MPNetForSequenceClassification, tf.MPNetConfig(**BERT_LIKE), ["q", "v"], 4),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(dim=48, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=64),
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
        12,
    ),
    "deberta": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(**BERT_LIKE),
        ["query_proj", "value_proj"],
        4,
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64),
        ["c_attn", "c_fc", "c_proj"],
        8,
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(**SIZES, image_size=16, patch_size=8),
        r".*layers?\.\d+\..*(query|value|q_proj|v_proj)",
        4,
    ),
    "clip": (
        tf.CLIPVisionModel,
        tf.CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        ["q_proj", "v_proj"],
        4,
    ),
}
OPTIONS = {
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 4, "left_out": 4},
    "kadaptation": {"phm_dim": 4},
    "lora_xs": {"rank": 4, "alpha": 160.0},
    "slora": {"rank": 4, "init": "nystrom", "alpha": 400.0},
}


def inputs(model):
    torch.manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(5, 64, (2, 9))}


def first_output(model):
    return model(**inputs(model))[0]


def build(architecture):
    torch.manual_seed(0)
    model_class, config, targets, expected = ARCHITECTURES[architecture]
    return model_class(config).eval(), targets, expected


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_injection_trains_and_reloads(architecture, method, tmp_path):
    base, targets, expected = build(architecture)
    before = first_output(base)
    model = get_peft_model(base, peft_config(method, {"target_modules": targets, **OPTIONS.get(method, {})})).eval()
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    assert len(layers) == expected
    torch.testing.assert_close(first_output(model), before)
    first_output(model).square().sum().backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trainable) >= len(layers)
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = first_output(model)
    assert not torch.allclose(after, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(architecture)[0], tmp_path).eval()
    assert torch.equal(first_output(again), after)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_targets_exist_for_every_architecture(architecture):
    model = get_peft_model(build(architecture)[0], peft_config("lsr", OPTIONS["lsr"]))
    assert [module for module in model.modules() if isinstance(module, AdapterLinear)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_all_linear_on_a_classifier_spares_its_head_once_the_task_is_named(method):
    options = {"target_modules": "all-linear", **OPTIONS.get(method, {})}
    model = get_peft_model(build("roberta")[0], peft_config(method, options, task_type="SEQ_CLS"))
    assert sum(isinstance(module, AdapterLinear) for module in model.modules()) == 12
    assert model.classifier.modules_to_save["default"].dense.weight.requires_grad
