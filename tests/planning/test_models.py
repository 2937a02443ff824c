"""`plan` on many architectures: it counts what training trains, and tells what it cannot count."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lsr_scale.config import run_from_dict
from lsr_scale.errors import UserError
from lsr_scale.planning import plan
from lsr_scale.training.assembly import adapt

LLAMA = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=128,
)
GPT = dict(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=128)
BERT = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
T5 = dict(d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, vocab_size=96)
DECODERS = {
    "Gemma2": {**LLAMA, "head_dim": 12},
    "Bloom": dict(hidden_size=48, n_layer=2, n_head=4, vocab_size=96),
    "GPTJ": {**GPT, "rotary_dim": 4},
    "Falcon": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96),
    "GPT2": GPT,
    "Qwen3Moe": {**LLAMA, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 12},
    "Mpt": dict(d_model=48, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=128),
}
ENCODERS = {"DebertaV2": BERT, "Bert": BERT, "T5": T5}


def tiny(kind, sizes, folder, method="lsr", training=None, **section):
    """Return the configuration of a tiny model, written into a folder, and a run on it."""
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config.save_pretrained(folder)
    adapter = {"method": method, **section.pop("adapter", {})}
    values = {"name": str(folder), "quantization": "none", "dtype": "float32", **section}
    run = run_from_dict(
        {
            "model": values,
            "adapter": adapter,
            "data": {"train": ["arc_easy"]},
            "training": {"max_length": 32, **(training or {})},
        }
    )
    return config, run


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_is_counted_as_it_is_trained(tmp_path, kind):
    config, run = tiny(kind, DECODERS[kind], tmp_path)
    result = plan(run)
    model, _ = adapt(run, AutoModelForCausalLM.from_config(config))
    assert result.trainable_parameters == model.get_nb_trainable_parameters()[0] > 0
    assert result.traced
    assert result.memory_gib.activations > 0


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_is_counted_as_it_is_trained_its_head_too(tmp_path, kind):
    options = {"rank": 4, "separation_rank": 2, "target_modules": "all-linear"}
    config, run = tiny(kind, ENCODERS[kind], tmp_path, task="seq_cls", num_labels=2, adapter=options)
    result = plan(run)
    config.num_labels = 2
    model, _ = adapt(run, AutoModelForSequenceClassification.from_config(config))
    assert result.trainable_parameters == model.get_nb_trainable_parameters()[0]
    heads = [name for name, _ in model.get_base_model().named_children() if "class" in name]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(f"{heads[0]}.modules_to_save" in name for name in trained)
    assert not any(f".{heads[0]}." in name and "lsr" in name for name in trained)


def test_a_step_that_needs_values_leaves_the_counts_and_says_so(tmp_path):
    _, run = tiny("T5", T5, tmp_path, task="seq_cls", num_labels=2)
    result = plan(run)
    assert not result.traced
    assert result.trainable_parameters > 0
    assert any("activations and workspace come on top" in line for line in result.warnings)


@pytest.mark.parametrize(("method", "targets"), [("lsr", None), ("lora", None)])
def test_without_default_targets_the_linear_layers_are_named(tmp_path, method, targets):
    _, run = tiny("Olmo2", LLAMA, tmp_path, method)
    with pytest.raises(UserError, match=r"no default for a olmo2 model; set it to all-linear.*q_proj"):
        plan(run)
    _, run = tiny("Olmo2", LLAMA, tmp_path, method, adapter={"target_modules": "all-linear"})
    assert plan(run).adapted_modules == 14


@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_a_target_of_which_nothing_would_come_is_refused_beside_one_that_matches(tmp_path, method):
    _, run = tiny("Llama", LLAMA, tmp_path, method, adapter={"target_modules": ["q_proj", "gate_porj"]})
    with pytest.raises(UserError, match=r"target_modules: 'gate_porj' matches no module; did you mean 'gate_proj'"):
        plan(run)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_on_experts_is_refused_and_the_names_it_is_told_are_planned(tmp_path, targets):
    sizes = {**LLAMA, "num_local_experts": 4}
    _, run = tiny("Mixtral", sizes, tmp_path, "lora", adapter={"target_modules": targets})
    with pytest.raises(UserError, match=r"adapter\.target_modules: .*linear layers, such as \[.*q_proj.*\]$") as told:
        plan(run)
    names = str(told.value).rpartition("[")[2].rstrip("]").split(", ")
    _, run = tiny("Mixtral", sizes, tmp_path, "lora", adapter={"target_modules": names})
    assert plan(run).adapted_modules == 2 * len(names)


def test_a_module_that_is_no_linear_layer_is_refused_in_words(tmp_path):
    _, run = tiny("Llama", LLAMA, tmp_path, "lora", adapter={"target_modules": ["mlp"]})
    with pytest.raises(UserError, match=r"adapter.target_modules: .*not supported.*name linear layers only"):
        plan(run)


def test_rows_of_one_model_are_of_one_dtype_on_every_path(tmp_path):
    """Experts in float32: torch's function of their shapes knows bfloat16 alone."""
    _, run = tiny("Qwen3Moe", DECODERS["Qwen3Moe"], tmp_path)
    halves = run.model_copy(update={"model": run.model.model_copy(update={"dtype": "bfloat16"})})
    wide, narrow = plan(run).memory_gib, plan(halves).memory_gib
    assert torch.float32.itemsize == 2 * torch.bfloat16.itemsize
    assert 1.5 * narrow.activations < wide.activations <= 2 * narrow.activations + 1e-4
