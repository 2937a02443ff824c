"""llama.cpp's LoRA adapter: the pairs under its tensor names, rows of q and k in its order.

For the LLaMA architecture llama.cpp keeps the rows of q_proj and k_proj of each head interleaved (its rotary form), so
`up` is permuted as the base's weights were when they became a GGUF. The scaling stands in `up`: alpha equals the rank,
or is 0 where ranks differ, which llama.cpp reads as "no scaling".
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lsr_scale.adapters.packing import checked_cast
from lsr_scale.errors import UserError
from lsr_scale.exporting.pairs import Pairs, metadata_of
from lsr_scale.exporting.source import AdapterSource
from lsr_scale.model import load_config, read_tokenizer

# Transformers' model types whose GGUF names and order of rows are known here
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
GGUF_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
FILE = "adapter.gguf"


def to_rotary_order(rows: Tensor, num_heads: int) -> Tensor:
    """Return a matrix `[heads * size, n]` with each head's two halves of rows interleaved, as llama.cpp has them."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def from_rotary_order(rows: Tensor, num_heads: int) -> Tensor:
    """Return the inverse of `to_rotary_order`."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def write_gguf(
    folder: Path, pairs: Pairs, section: dict[str, Any], dtype: torch.dtype, source: AdapterSource
) -> dict[str, Any]:
    """Write `adapter.gguf`.

    Args:
        folder: An existing folder.
        pairs: By module.
        section: Arguments of `load_base` for the base, whose configuration is read.
        dtype: float32, float16 or bfloat16.
        source: For the metadata.

    Returns:
        What the model card says.

    Raises:
        UserError: for an architecture or a layer that llama.cpp's names are not known of.
    """
    if source.extra:
        raise UserError(
            f"--to gguf: {sorted(source.extra)[0]} is fully trained (modules_to_save); llama.cpp's adapters hold pairs "
            "only"
        )
    config: Any = load_config(section["name"], section["revision"])
    names, permuted, architecture = names_of(pairs, config)
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {down.shape[0] for down, _ in pairs.values()}
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    writer.add_name(f"{source.method} adapter")
    for name, value in metadata_of(source, "gguf").items():
        writer.add_string(f"lsr_scale.{name}", value)
    for name, (value, kind) in tokenizer_fields(source).items():
        writer.add_key_value(name, value, kind)
    for module, (down, up) in pairs.items():
        if module in permuted:
            up = to_rotary_order(up, permuted[module])
        for part, value in (("lora_a", down), ("lora_b", up)):
            kind, array = array_of(value, GGUF_TYPES[str(dtype).removeprefix("torch.")], f"{module}.{part}")
            writer.add_tensor(f"{names[module]}.weight.{part}", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"bytes of the file": (folder / FILE).stat().st_size, "architecture": gguf.MODEL_ARCH_NAMES[architecture]}


def tokenizer_fields(source: AdapterSource) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """Return what a run's tokenizer says of the end and of chats under GGUF's names; nothing where there is none."""
    if source.tokenizer is None:
        return {}
    tokenizer: Any = read_tokenizer(source.tokenizer)
    fields: dict[str, tuple[Any, gguf.GGUFValueType]] = {}
    if tokenizer.eos_token_id is not None:
        fields[gguf.Keys.Tokenizer.EOS_ID] = tokenizer.eos_token_id, gguf.GGUFValueType.UINT32
    if isinstance(tokenizer.chat_template, str):
        fields[gguf.Keys.Tokenizer.CHAT_TEMPLATE] = tokenizer.chat_template, gguf.GGUFValueType.STRING
    return fields


def read_back(file: Path, pairs: Pairs, section: dict[str, Any]) -> Pairs:
    """Return the pairs in a file that `write_gguf` wrote, by module; `pairs` gives the modules."""
    names, permuted, _ = names_of(pairs, load_config(section["name"], section["revision"]))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    written: Pairs = {}
    for module, name in names.items():
        parts = []
        for part in ("lora_a", "lora_b"):
            tensor = tensors[f"{name}.weight.{part}"]
            parts.append(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()))
        down, up = parts
        written[module] = down, from_rotary_order(up, permuted[module]) if module in permuted else up
    return written


def names_of(modules: Iterable[str], config: Any) -> tuple[dict[str, str], dict[str, int], Any]:
    """Return llama.cpp's name of every module, the number of heads of those in rotary order, and the architecture."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"--to gguf: model_type {config.model_type!r} is none of {', '.join(ARCHITECTURES)}; export lora, and use "
            "llama.cpp's convert_lora_to_gguf.py"
        )
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names: dict[str, str] = {}
    permuted: dict[str, int] = {}
    for module in modules:
        name = table.get_name(module)
        if name is None:
            raise UserError(
                f"--to gguf: llama.cpp has no name for {module} of {config.model_type}; export lora instead"
            )
        names[module] = name
        kind = name.rpartition(".")[2]
        if architecture == gguf.MODEL_ARCH.LLAMA and kind in _PERMUTED:
            permuted[module] = getattr(config, _PERMUTED[kind], None) or config.num_attention_heads
    return names, permuted, architecture


def array_of(
    value: Tensor, kind: gguf.GGMLQuantizationType, name: str = "a tensor"
) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
    """Return a tensor's values in a type, and that type; float16 where a row does not divide into q8_0's blocks.

    Raises:
        UserError: for values beyond the type's range.
    """
    if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind == gguf.GGMLQuantizationType.F16:
        checked_cast(value, torch.float16, name)
    elif kind == gguf.GGMLQuantizationType.Q8_0:
        checked_cast(value / 127, torch.float16, name)  # a block's scale
    return kind, gguf.quants.quantize(value.float().contiguous().numpy(), kind)
