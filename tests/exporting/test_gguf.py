"""A full GGUF is the adapted model to Transformers and, where it is installed, to llama.cpp."""

import random

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.interop.llama_cpp_agreement import LlamaCpp
from lsr_scale import UserError
from lsr_scale.cli import main
from lsr_scale.exporting import export
from lsr_scale.exporting.gguf_file import ARCHITECTURES, names_of
from lsr_scale.model import load_base, load_config
from tests.exporting.test_folder import IDS, adapted, base_folder, logits, saved, silent  # noqa: F401
from tests.helpers.tiny_models import TINY_SIZES, randomize
from tests.helpers.tiny_runs import save_llama


def tiny_gguf(base, file, **changes):
    """Write a GGUF of a tiny model's shapes without a vocabulary, all of its values zero."""
    config = load_config(str(base))
    model = load_base(str(base), quantization="none")
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, changes.pop("architecture", kind))
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_array("tiny.words", ["a", "b"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        theirs = f"{names_of([module], config)[0][module]}.{part}"
        writer.add_tensor(theirs, np.zeros(changes.get(theirs, tuple(value.shape)), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("method", "quantization", "dtype", "largest"),
    [
        ("lsr", "nf4", "float32", 1e-5),
        ("krona", "none", "float16", 5e-3),
        ("kron_lora", "int8", "bf16", 3e-2),
    ],
)
def test_a_full_gguf_is_the_adapted_model_to_transformers(
    base_folder,  # noqa: F811
    tmp_path,
    method,
    quantization,
    dtype,
    largest,
):
    adapter = saved(base_folder, tmp_path / "adapter", method, quantization=quantization)
    like = tiny_gguf(base_folder, tmp_path / "base.gguf")
    result = export(adapter, "gguf", tmp_path / "out", merged=True, base_gguf=str(like), dtype=dtype, say=silent)
    assert result["agreement"]["relative_error"] < largest
    assert result["agreement"]["share_of_effect"] < 0.1
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.get_field("tiny.words").contents() == ["a", "b"]
    assert reader.get_field("lsr_scale.method").contents() == method
    assert reader.get_field("general.file_type").contents() == {"float32": 0, "float16": 1, "bf16": 32}[dtype]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == {"float32": "F32", "float16": "F16", "bf16": "BF16"}[dtype]


def test_a_full_gguf_in_8_bits(tmp_path):
    base = save_llama(
        tmp_path / "base", hidden_size=64
    )  # rows of 64 divide into blocks of 32, down_proj's of 80 do not
    adapter = saved(base, tmp_path / "adapter")
    like = tiny_gguf(base, tmp_path / "base.gguf")
    result = export(adapter, "gguf", tmp_path / "out", merged=True, base_gguf=str(like), dtype="q8_0", say=silent)
    assert 1e-4 < result["agreement"]["relative_error"] < 3e-2
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert [types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_down", "attn_norm")] == ["Q8_0", "F16", "F32"]
    assert reader.get_field("general.file_type").contents() == 7


def test_a_gguf_of_another_model_or_none_is_refused(base_folder, tmp_path, capsys):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter")
    options = {"merged": True, "say": silent}
    with pytest.raises(UserError, match=r"did not come from a GGUF.*--base-gguf.*convert_hf_to_gguf.py"):
        export(adapter, "gguf", tmp_path / "out", **options)
    wider = {"blk.1.attn_k.weight": (32, 48)}
    other = tiny_gguf(base_folder, tmp_path / "other.gguf", **wider)
    with pytest.raises(UserError, match=r"blk.1.attn_k.weight is \[32, 48\] there, \[24, 48\] in the base"):
        export(adapter, "gguf", tmp_path / "out", base_gguf=str(other), **options)
    qwen = tiny_gguf(base_folder, tmp_path / "qwen.gguf", architecture="qwen2")
    with pytest.raises(UserError, match="architecture 'qwen2'"):
        export(adapter, "gguf", tmp_path / "out", base_gguf=str(qwen), **options)
    (tmp_path / "text.gguf").write_text("no such thing" * 10)
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        export(adapter, "gguf", tmp_path / "out", base_gguf=str(tmp_path / "text.gguf"), **options)
    assert main(["export", str(adapter), "--to", "lora", "--merged", "--out", str(tmp_path / "out")]) == 2
    assert "--merged: goes with --to gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_gguf_is_refused_or_loads_unchanged(base_folder, tmp_path):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter")
    whole = tiny_gguf(base_folder, tmp_path / "base.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    options = {"merged": True, "base_gguf": str(damaged), "verify": False, "say": silent}
    ends = []
    for seed in range(60):
        chance = random.Random(seed)
        content = bytearray(whole)
        if seed % 3 == 0:
            del content[chance.randrange(len(content)) :]
        for _ in range(seed % 3 and chance.choice([1, 2, 8])):
            content[chance.randrange(chance.choice([64, 3000, len(content)]))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(bytes(content))
        out = tmp_path / f"out-{seed}"
        try:
            export(adapter, "gguf", out, **options)
            ends.append("whole")
        except UserError:
            ends.append("refused")
            assert not out.exists()
    assert ends.count("refused") > 40


def tiny_model(kind, folder):
    """Save a random two-layer model of an architecture that llama.cpp's names are known of."""
    if kind == "llama":
        return save_llama(folder)
    config_class, model_class = {
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    sizes = {**TINY_SIZES, "vocab_size": 304, **({"head_dim": 16} if kind == "qwen3" else {})}
    torch.manual_seed(0)
    model = model_class(config_class(**sizes))
    randomize(model, scale=0.05)  # so that biases and norms are not at their start
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_is_read_back_by_transformers(tmp_path, kind):
    base = tiny_model(kind, tmp_path / "base")
    adapter = saved(base, tmp_path / "adapter", quantization="nf4")
    like = tiny_gguf(base, tmp_path / "base.gguf")
    options = {"merged": True, "dtype": "float32", "base_gguf": str(like), "say": silent}
    result = export(adapter, "gguf", tmp_path / "out", **options)
    assert result["agreement"]["relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "lsr") for kind in sorted(ARCHITECTURES)), ("llama", "kron_lora"), ("llama", "lora")]
)
def test_llama_cpp_gives_our_logits(tmp_path, kind, method):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not here: pip install llama-cpp-python (minutes)")
    base = tiny_model(kind, tmp_path / "model")
    adapter = saved(base, tmp_path / "adapter", method)
    still = saved(base, tmp_path / "still", scale=0.0)
    like = tiny_gguf(base, tmp_path / "base.gguf")
    quiet = {"verify": False, "say": silent}
    full = {"merged": True, "dtype": "float32", "base_gguf": str(like), **quiet}
    export(adapter, "gguf", tmp_path / "lora", **quiet)
    export(adapter, "gguf", tmp_path / "full", **full)
    export(still, "gguf", tmp_path / "plain", **full)
    wanted, without = logits(adapted(base, method))[0], logits(load_base(str(base), quantization="none"))[0]
    plain = tmp_path / "plain" / "model.gguf"
    for model, expected in (
        (LlamaCpp(plain), without),
        (LlamaCpp(plain, tmp_path / "lora" / "adapter.gguf"), wanted),
        (LlamaCpp(tmp_path / "full" / "model.gguf"), wanted),
    ):
        got = torch.from_numpy(model.logits(IDS[0].tolist()))
        assert (got - expected).norm() < 1e-4 * expected.norm()
    assert (without - wanted).norm() > 0.05 * wanted.norm()
