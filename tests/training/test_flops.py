"""Model FLOPs of a token, counted by hand, and when MFU is not told."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from lsr_scale import LsrConfig
from lsr_scale.training import flops
from lsr_scale.training.flops import flops_per_token, peak_flops, utilization
from tests.helpers.tiny_models import quantize, tiny_llama

# of tiny_llama: 48 wide, 4 heads of 12, 2 of them for keys, 80 between, 2 layers, 96 tokens
LAYER = 48 * 48 * 2 + 2 * 48 * 24 + 3 * 48 * 80
HEAD = 48 * 96
ROWS = Dataset.from_dict({"input_ids": [[1] * 10, [1] * 30]})
CONTEXT = (10 * 10 + 30 * 30) / 40
ATTENTION = 6 * CONTEXT * 48 * 2


def adapted(model, config=None):
    return get_peft_model(model, config or LsrConfig(rank=4, separation_rank=2, target_modules="all-linear"))


@pytest.mark.parametrize("base", ["float", "nf4", "int8"])
@pytest.mark.parametrize("method", [None, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])], ids=["lsr", "lora"])
def test_a_frozen_weight_costs_four_and_attention_six_a_token_of_its_context(base, method):
    model = tiny_llama() if base == "float" else quantize(tiny_llama(), base)
    assert flops_per_token(adapted(model, method), ROWS) == 4 * (2 * LAYER + HEAD) + ATTENTION


def test_the_matrix_products_of_a_step_are_those():
    """What torch counts of a forward pass is half of it, but for attention, which it counts as if not causal."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 20, dtype=torch.long))
    rows = Dataset.from_dict({"input_ids": [[1] * 20]})
    attention = 6 * 20 * 48 * 2
    products = (
        sum(
            n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name) and "bmm" not in str(name)
        )
        / 20
    )
    assert flops_per_token(adapted(model), rows) - attention == 2 * products


@pytest.mark.parametrize(
    "columns",
    [
        {"labels": [[-100] * 5 + [1] * 5, [-100] * 25 + [1] * 5]},
        {"completion_mask": [[0] * 5 + [1] * 5, [0] * 25 + [1] * 5]},
        {"assistant_masks": [[0] * 5 + [1] * 5, [0] * 25 + [1] * 5]},
    ],
)
def test_the_head_costs_for_supervised_tokens_alone(columns):
    rows = Dataset.from_dict({"input_ids": ROWS["input_ids"][:], **columns})
    assert flops_per_token(adapted(tiny_llama()), rows) == 4 * (2 * LAYER + HEAD / 4) + ATTENTION


@pytest.mark.parametrize("packs", [[[10, 30]], [[10, 30], [10, 30]], [[10, 30], [10, 30, 10, 30]]])
@pytest.mark.parametrize("form", [None, "numpy"])  # a trainer's rows are arrays
def test_packed_documents_have_contexts_of_their_own(packs, form):
    ids = [[1] * sum(lengths) for lengths in packs]
    rows = Dataset.from_dict({"input_ids": ids, "seq_lengths": packs}).with_format(form)
    assert flops_per_token(adapted(tiny_llama()), rows) == 4 * (2 * LAYER + HEAD) + ATTENTION


def test_a_weight_that_is_trained_costs_six():
    config = LsrConfig(rank=4, separation_rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert flops_per_token(adapted(tiny_llama(), config), ROWS) == 4 * 2 * LAYER + 6 * HEAD + ATTENTION


def test_what_cannot_be_counted_is_not_told():
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    assert flops_per_token(adapted(mixture, lora), ROWS) is None
    convolutions = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=96))
    assert flops_per_token(adapted(convolutions, LoraConfig(r=2, target_modules=["c_attn"])), ROWS) is None
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    assert flops_per_token(adapted(classifier, LoraConfig(r=2, target_modules=["q_proj"])), ROWS) is None
    assert flops_per_token(adapted(tiny_llama()), None) is None
    assert flops_per_token(adapted(tiny_llama()), ROWS.select([])) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_a_gpus_peak_is_that_of_its_data_sheet_or_not_told(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == (None if peak is None else pytest.approx(peak * 1e12))


def test_mfu_is_over_all_gpus_and_of_16_bits(monkeypatch):
    model = adapted(tiny_llama(torch.bfloat16))
    monkeypatch.setattr(flops, "peak_flops", lambda: 1e9)
    one = utilization(model, ROWS)
    assert one == flops_per_token(model, ROWS) / 1e9
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert utilization(model, ROWS) == one / 4
    assert utilization(adapted(tiny_llama(torch.float32)), ROWS) is None
    monkeypatch.setattr(flops, "peak_flops", lambda: None)
    assert utilization(model, ROWS) is None
