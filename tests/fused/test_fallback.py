"""What cannot run fused says why and runs as without: no model with an adapter is refused, none fails later."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lsr_scale
from lsr_scale.adapters import peft_config
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama
from tests.helpers.tiny_runs import byte_tokenizer, do, factors, metrics, tiny_run

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)


def gpt2(**changes):
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 304, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **changes))


def gemma():
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=12))


def step(model, ids):
    model.train().zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach().double(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check(model, ids, expected):
    """Fuse a model, compare a step of it with one before, and the report's one line with what is expected."""
    before = step(randomize(model), ids)
    report = lsr_scale.fuse(model)
    for one, other in zip(step(model, ids), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert str(report) == expected
    return report


ONE_BY_ONE = " adapted linears fused one by one (decoder layers fuse in Llama, Mistral, Qwen2, Qwen3 models)"


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"hidden_size": 90, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16}, 90),
        ({"intermediate_size": 84}, 84),
        ({"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10}, 50),
    ],
)
@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_widths_that_are_no_multiple_of_8(method, sizes, found, ids):
    options = {"target_modules": SEVEN_LINEARS, "rank": 2}
    model = get_peft_model(tiny_llama(torch.float64, **sizes), peft_config(method, options, "CAUSAL_LM"))
    reason = f"a base layer has {found} inputs, no multiple of 8"
    report = check(model, ids, f"0 of 2 decoder layers run fused; the others unfused: {reason}")
    assert set(report.unfused_linears.values()) == {reason}
    assert 0 < report.fused_linears < 14


def test_only_conv1d_is_adapted(ids):
    model = get_peft_model(gpt2(), peft_config("lora", {"target_modules": ["c_attn", "c_fc"], "rank": 2}, "CAUSAL_LM"))
    check(model, ids, f"0{ONE_BY_ONE}; 4 adapted modules unfused: a base layer is Conv1D")


def test_conv1d_beside_a_linear(ids):
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
    check(model, ids, f"1{ONE_BY_ONE}; 2 adapted modules unfused: a base layer is Conv1D")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft_config("krona", {"target_modules": ["q_proj"]}, "CAUSAL_LM"), "krona has no low-rank pair"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "the adapter is ia3"),
        (LoHaConfig(r=2, target_modules=["q_proj"]), "the adapter is loha"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "a LoRA variant (DoRA and the like)"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "a base layer is GemmaTextScaledWordEmbedding"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5),
            "dropout on the adapter's input, and training",
        ),
    ],
)
def test_other_adapters(config, reason, ids):
    model = get_peft_model(gemma(), config).train()
    report = lsr_scale.fuse(model)
    step(model, ids)
    assert len(report.unfused_linears) == 1
    assert next(iter(report.unfused_linears.values())).startswith(reason)
    assert report.fused_linears == 0


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_gpt2_that_wants_the_fused_path_trains(tmp_path, capsys):
    gpt2(eos_token_id=2, bos_token_id=1).save_pretrained(tmp_path / "model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **tokens).save_pretrained(tmp_path / "model")
    sections = {
        "model": {"name": str(tmp_path / "model"), "quantization": "none", "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 2, "target_modules": ["c_attn", "c_proj"]},
        "eval": {"tasks": []},
    }
    found = []
    for fused in ("on", "off"):
        training = {"output_dir": str(tmp_path / fused), "fused": fused, "save_strategy": "no"}
        folder = do(tiny_run(tmp_path, **sections, training=training))
        found.append((factors(folder), [row["loss"] for row in metrics(folder) if "loss" in row]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
