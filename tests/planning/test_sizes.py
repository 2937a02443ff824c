"""Sizes predicted from a model on the meta device equal those of the loaded base and the saved file, byte for byte."""

import peft
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3MoeConfig, RobertaConfig

from lsr_scale import adapters
from lsr_scale.config import run_from_dict
from lsr_scale.model import load_base, load_config, meta_model, quantization_config
from lsr_scale.planning import planner
from lsr_scale.planning.sizes import adapter_file_bytes, frozen_bytes, quantized_layers

CONFIGS = {
    # no dimension a power of two, a last block that is not full, and blocks that are not full 256s
    "llama": LlamaConfig(
        hidden_size=144,
        intermediate_size=236,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    ),
    "llama-tied": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=97,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        head_dim=16,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97),
    "roberta": RobertaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=97
    ),
}


def _stored_bytes(model) -> int:
    """Return the bytes of every storage that a loaded base refers to, quantization state included, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code]
        tensors += [getattr(weight, name) for name in ("SCB", "CB") if getattr(weight, name, None) is not None]
        layer_state = getattr(module, "state", None)
        tensors += [getattr(layer_state, name, None) for name in ("SCB", "CB")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize(
    ("quantization", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("none", True)]
)
def test_frozen_bytes_are_those_of_the_loaded_base(tmp_path, config, quantization, double):
    config.save_pretrained(tmp_path)
    task = "seq_cls" if config.model_type == "roberta" else "causal_lm"
    loaded = load_base(
        str(tmp_path),
        task=task,
        num_labels=3 if task == "seq_cls" else None,
        quantization=quantization,
        double_quantization=double,
        random_weights=True,
        device=torch.device("cpu"),
    )
    empty = meta_model(config, task, 3 if task == "seq_cls" else None)
    names = quantized_layers(empty)
    assert frozen_bytes(empty, names, quantization, double).total == _stored_bytes(loaded)
    kinds = {name for name, module in loaded.named_modules() if "bit" in type(module).__name__}
    assert kinds == (set(names) if quantization != "none" else set())


@pytest.mark.parametrize("config", [CONFIGS["llama"], CONFIGS["llama-tied"]], ids=["llama", "tied"])
def test_layers_that_a_checkpoint_leaves_unquantized_are_counted_so(tmp_path, config):
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    quantizer = quantization_config("nf4", True, torch.bfloat16, ["lm_head", "model.layers.0.mlp"])
    options = {"dtype": torch.bfloat16, "quantization_config": quantizer}
    LlamaForCausalLM.from_pretrained(tmp_path / "whole", **options).save_pretrained(tmp_path / "nf4")
    loaded = load_base(str(tmp_path / "nf4"), dtype="bfloat16", device=torch.device("cpu"))
    adapter = {"method": "lora", "rank": 2, "target_modules": ["q_proj"]}
    sections = {"model": {"name": str(tmp_path / "nf4")}, "adapter": adapter, "data": {"train": ["rows.jsonl"]}}
    counted = planner.count(run_from_dict(sections), trace=False)
    assert counted.memory.frozen.total == _stored_bytes(loaded)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lsr", {"rank": 4, "separation_rank": 2, "target_modules": "all-linear"}),
        ("kron_lora", {"rank": 2, "left_out": 2, "target_modules": ["q_proj", "up_proj"]}),
        ("lora", {"rank": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_adapter_bytes_are_those_of_the_saved_file(tmp_path, method, options):
    config = CONFIGS["llama"]
    empty = peft.get_peft_model(meta_model(config), adapters.peft_config(method, options, "CAUSAL_LM"))
    config.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), random_weights=True, device=torch.device("cpu"))
    peft.get_peft_model(base, adapters.peft_config(method, options, "CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    assert adapter_file_bytes(empty) == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_mistral_in_four_bits_takes_what_its_layout_says():
    model = meta_model(load_config("mistralai/Mistral-7B-v0.1"))
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    frozen = frozen_bytes(model, quantized_layers(model), "nf4", True)
    assert frozen.embedding == frozen.head == 2 * 32000 * 4096
    assert frozen.layers == linears // 2
    assert frozen.matrices == frozen.layers + frozen.embedding + frozen.head
    scales = linears // 64 + 4 * linears // 64 // 256
    assert frozen.state == 2 * 65 * 4096 + scales + 224 * (64 + 4 + 1024) + sum(b.numel() * 4 for b in model.buffers())


def test_experts_are_read_one_by_one_and_joined():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = Qwen3MoeConfig(**sizes, vocab_size=64, moe_intermediate_size=96, num_experts=4)
    model = meta_model(config)
    assert frozen_bytes(model, quantized_layers(model), "nf4", True).largest == 2 * 2 * (4 * 2 * 96 * 64)
