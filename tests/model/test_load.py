"""Names, configurations, meta models, frozen quantized bases, tokenizers, and errors."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import FrozenLinear4bit, FrozenLinear8bit, dequantize
from lsr_scale.model import known_configs, load_base, load_config, meta_model, model_class, resolve
from lsr_scale.model.gather import GatherGroup
from lsr_scale.model.load_errors import explain_load_errors
from lsr_scale.model.quantize import quantization_config
from lsr_scale.model.shard import Sharding, sharded_matrices
from tests.helpers.tiny_models import tiny_llama

SMOLLM2 = "builtin:smollm2-135m-instruct"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a tiny LLaMA saved in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """Return a copy of that folder that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-2-9b", 9_241_705_984),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("openai-community/gpt2", 124_439_808),
    ],
)
def test_a_well_known_model_has_its_published_parameter_count_without_network(name, num_parameters):
    model = meta_model(load_config(name))
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())


def test_every_entry_of_the_table_makes_a_model():
    for name in known_configs.known_names():
        config = load_config(name)
        task = "causal_lm" if any(a.endswith(("CausalLM", "LMHeadModel")) for a in config.architectures) else "seq_cls"
        assert meta_model(config, task, num_labels=2).config.model_type == config.model_type


def test_a_name_close_to_a_known_one_is_suggested():
    with pytest.raises(UserError, match=r"did you mean 'mistralai/Mistral-7B-v0\.1'"):
        load_config("mistralai/Mistral-7B-v0.1/")
    with pytest.raises(UserError, match=r"hub cannot be reached.*local folder"):
        load_config("mistralai/Mistral-7B-v0.9")
    with pytest.raises(UserError, match="did you mean 'builtin:smollm2-135m-instruct'"):
        resolve("builtin:smollm2")


def test_a_folder_that_is_not_there_and_a_file_are_refused(tmp_path, saved):
    with pytest.raises(UserError, match="there is no such folder"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="got a file"):
        resolve(str(saved / "model.safetensors"))
    assert resolve(str(saved)) == str(saved)
    assert resolve("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config.json in this folder"),
        ("{", "not a readable JSON configuration"),
        ("[]", "expected an object, got list"),
        ('{"hidden_size": 8}', "there is no model_type in it"),
        ('{"model_type": "llamma"}', "does not know its architecture"),
        ('{"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}', "Python code from its repository, which is never"),
    ],
)
def test_a_broken_configuration_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path))


def test_a_runs_folder_is_no_base_model(tmp_path):
    for name in ("config.yaml", "env.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"a run's folder, where a model is expected; .* set adapter\.start_from: "):
        resolve(str(tmp_path))


def test_an_adapter_folder_is_no_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="this is an adapter, without its base model"):
        load_config(str(tmp_path))


def test_the_task_must_suit_the_architecture():
    with pytest.raises(UserError, match="is an encoder"):
        model_class(load_config("FacebookAI/roberta-base"), "causal_lm")
    with pytest.raises(UserError, match="cannot do causal_lm"):
        model_class(load_config("microsoft/mpnet-base"), "causal_lm")
    with pytest.raises(UserError, match="did you mean 'seq_cls'"):
        model_class(load_config("FacebookAI/roberta-base"), "seqcls")


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [("nf4", FrozenLinear4bit), ("fp4", FrozenLinear4bit), ("int8", FrozenLinear8bit), ("none", torch.nn.Linear)],
)
def test_a_loaded_base_is_frozen_and_quantized_but_for_its_head(saved, quantization, layer):
    model = load_base(str(saved), quantization=quantization, device=CPU)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {type(m) for n, m in linears.items() if n != "lm_head"} == {layer}
    assert type(linears["lm_head"]) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.config.use_cache
    if layer is FrozenLinear4bit:
        weight = linears["model.layers.0.mlp.up_proj"].weight
        assert weight.quant_type == quantization
        assert weight.dtype == torch.uint8
        assert weight.quant_state.nested
        assert linears["model.layers.0.mlp.up_proj"].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_checkpoints_with_transposed_layers_load_too(tmp_path, quantization):
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96)).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), quantization=quantization, dtype="float32", device=CPU)
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.long)).logits).all()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_held_in_the_dtype_that_is_asked_for(
    saved, tmp_path, ids, kind, stored, dtype
):
    quantized = quantization_config(kind, True, getattr(torch, stored), ["lm_head"])
    model = LlamaForCausalLM.from_pretrained(saved, dtype=stored, quantization_config=quantized)
    model.save_pretrained(tmp_path)
    given = {"quantization": kind, "dtype": dtype, "device": CPU}
    held, sharded = (load_base(str(tmp_path), **given, sharding=sharding) for sharding in (None, Sharding(True)))
    floats = {name: p.dtype for name, p in held.named_parameters() if p.is_floating_point()}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(floats)
    assert set(floats.values()) == {getattr(torch, dtype)}
    assert torch.equal(sharded(input_ids=ids).logits, held(input_ids=ids).logits), "bytes of one dtype read as another"


@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
def test_a_classifier_of_a_checkpoint_that_is_quantized_already_has_a_head_that_is_not(saved, tmp_path, ids, skipped):
    quantized = quantization_config("nf4", True, torch.bfloat16, skipped)
    model = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=quantized)
    model.save_pretrained(tmp_path)
    given = {"task": "seq_cls", "num_labels": 3, "dtype": "float32", "device": CPU}
    held = load_base(str(tmp_path), **given, attention="eager")
    assert type(held.score) is torch.nn.Linear
    assert held.config._attn_implementation == "eager"
    assert isinstance(held.model.layers[0].mlp.up_proj, FrozenLinear4bit)
    assert held(input_ids=ids).logits.shape == (len(ids), 3)


def test_double_quantization_can_be_left_out(saved):
    model = load_base(str(saved), double_quantization=False, device=CPU)
    assert not model.model.layers[0].mlp.up_proj.weight.quant_state.nested


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_that_is_quantized_already_is_held_as_bytes(saved, tmp_path, storage, offload, recwarn):
    """Whatever they are stored as: FSDP wants the dtype of the other weights, and DeepSpeed's engine casts those."""
    wanted = load_base(str(saved), double_quantization=False, dtype="float32", device=CPU)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    quantized = LlamaForCausalLM.from_pretrained(saved, quantization_config=config, dtype=torch.bfloat16)
    quantized.save_pretrained(tmp_path)
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert file["model.layers.0.mlp.up_proj.weight"].dtype == storage
    model = load_base(str(tmp_path), dtype="float32", device=CPU, sharding=Sharding(offload))
    assert not [str(one.message) for one in recwarn if "quantization_config" in str(one.message)]
    torch.nn.Module.to(model, torch.bfloat16)  # as an engine does
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear4bit):
            GatherGroup(sharded_matrices([module])).unshard()
            assert module.weight.dtype == module.quant_storage == torch.uint8
            assert module.compute_dtype == torch.float32
            assert not module.weight.quant_state.nested
            assert torch.equal(dequantize(module, torch.float32), dequantize(wanted.get_submodule(name), torch.float32))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_forward_in_eval_mode_leaves_weights_and_gradients_as_they_were(saved, ids, quantization):
    """On CPUs with AVX512-BF16 the layer of bitsandbytes repacks its weight here, and gradients stop for good."""
    model = load_base(str(saved), quantization=quantization, device=CPU)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    assert not model.training
    with torch.no_grad():
        first = model(ids).logits
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(model(ids).logits, first)
    model.train()
    embedded_ids = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded_ids).logits.float().sum().backward()
    assert embedded_ids.grad.abs().sum() > 0


def test_a_classifier_gets_a_new_head_that_is_reproducible_and_not_quantized(saved, caplog):
    heads = [load_base(str(saved), task="seq_cls", num_labels=3, seed=seed, device=CPU).score for seed in (1, 1, 2)]
    assert heads[0].weight.shape == (3, 48)
    assert heads[0].weight.dtype == torch.bfloat16
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert "score.weight: they start at random" in caplog.text


def test_loading_leaves_the_random_state_alone(saved):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_base(str(saved), seed=1, device=CPU)
    assert torch.equal(torch.rand(3), expected)


def test_damaged_and_missing_weights_are_refused(copied):
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_base(str(copied), device=CPU)
    file.unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        load_base(str(copied), device=CPU)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_weights_of_another_model_are_refused(copied, quantization):
    file = copied / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    lost = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    safetensors.torch.save_file(lost, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"have no model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(copied), quantization=quantization, device=CPU)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "hidden_size": 96, "head_dim": 24}))
    with pytest.raises(UserError, match="do not have the shapes"):
        load_base(str(copied), quantization=quantization, device=CPU)


def test_an_unknown_dtype_or_attention_is_refused(saved):
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        load_base(str(saved), dtype="bfloat", device=CPU)
    with pytest.raises(UserError, match="flash-attn is not installed; set it to auto"):
        load_base(str(saved), attention="flash_attention_2", device=CPU)


def test_a_model_that_does_not_fit_is_told_with_what_there_was():
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.21 GiB is "
        "free. Including non-PyTorch memory, this process has 14.5 GiB memory in use. If reserved but unallocated "
        "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. See documentation"
    )
    told = (
        "model.name 'm': the model does not fit into the GPU's memory (Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 15.77 GiB of which 1.21 GiB is free. Including non-PyTorch memory, this process has 14.5 GiB "
        "memory in use); `lsr-scale plan` says what it takes"
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"), explain_load_errors("m", None):
        raise torch.OutOfMemoryError(said)
    with pytest.raises(UserError, match="the GPU's memory; `lsr-scale plan`"), explain_load_errors("m", None):
        raise torch.OutOfMemoryError("CUDA error: out of memory")
