"""A full GGUF of the adapted model: merged weights, and all else out of a GGUF of the base.

The vocabulary and the architecture's numbers are copied from that GGUF as they stand (llama.cpp's own converter makes
them for any model); the end token and the chat template are the run's; tensors and their type are new, and keys
`lsr_scale.*` say where they come from. Tensors are written one by one.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lsr_scale.errors import UserError
from lsr_scale.exporting.gguf_file import GGUF_TYPES, array_of, names_of, to_rotary_order, tokenizer_fields
from lsr_scale.exporting.merged import MergedWeights
from lsr_scale.exporting.pairs import metadata_of
from lsr_scale.exporting.source import AdapterSource
from lsr_scale.model import builtin, read_tokenizer
from lsr_scale.screen import Progress

FILE = "model.gguf"
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# tables that llama.cpp's converter computes from the configuration; no checkpoint has them
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def write_merged_gguf(
    folder: Path,
    source: AdapterSource,
    section: dict[str, Any],
    dtype: str,
    base_gguf: str | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model.gguf`.

    Args:
        folder: An existing folder.
        source: The adapter.
        section: Arguments of `load_base` for its base.
        dtype: Of the matrices: float16, float32, bfloat16 or q8_0; vectors stay in float32, as llama.cpp wants them.
        base_gguf: A GGUF of the base, of any type; None for a built-in model, which has its own.
        progress: Shows which tensor it is at.

    Returns:
        What the model card says.

    Raises:
        UserError: if there is no GGUF of the base, it is another model's, or the base cannot be merged.
    """
    reader = _open(base_gguf, section["name"])
    weights = MergedWeights(source, section, "gguf --merged")
    modules = [name.rpartition(".")[0] for name in weights.shapes]
    names, permuted, architecture = names_of(modules, weights.config)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    where = base_gguf or section["name"]
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    if field is None or field.contents() != gguf.MODEL_ARCH_NAMES[architecture]:
        raise UserError(
            f"--base-gguf {where}: is of the architecture {field.contents() if field else 'unknown'!r}, the base of "
            f"{gguf.MODEL_ARCH_NAMES[architecture]!r}; name a GGUF of the same model"
        )

    def name_of(name: str) -> str:
        module, _, part = name.rpartition(".")
        return f"{names[module]}.{part}"

    tied = "output.weight" not in theirs and bool(weights.config.tie_word_embeddings)
    ours = {name_of(name): shape for name, shape in weights.shapes.items()}
    if tied:
        ours.pop("output.weight", None)
    _check_same(where, ours, theirs)

    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    run_fields = tokenizer_fields(source)
    _check_end_token(where, reader, run_fields, source)
    _copy_fields(reader, writer, run_fields)
    writer.add_file_type(_FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in metadata_of(source, "gguf --merged", dtype=dtype).items():
        writer.add_string(f"lsr_scale.{name}", value)
    computed = [theirs[name] for name in _COMPUTED if name in theirs]
    for tensor in computed:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes)
    for name, shape in ours.items():
        kind, example = array_of(torch.zeros(shape[-1]), _type(shape, dtype))
        rows = int(np.prod(shape[:-1]))
        writer.add_tensor_info(name, [*shape[:-1], *example.shape], example.dtype, rows * example.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in computed:
        writer.write_tensor_data(np.ascontiguousarray(tensor.data))
    for name, value in (progress or Progress(quiet=True)).over(weights, len(weights.shapes), "tensor"):
        if name_of(name) in ours:
            heads = permuted.get(name.rpartition(".")[0])
            writer.write_tensor_data(array_of(_in_order(value, heads), _type(list(value.shape), dtype), name)[1])
    writer.close()
    return {
        "dtype": dtype,
        "bytes of the file": (folder / FILE).stat().st_size,
        "architecture": gguf.MODEL_ARCH_NAMES[architecture],
        "vocabulary and metadata from": Path(where).name,
    }


def _open(base_gguf: str | None, name: str) -> gguf.GGUFReader:
    if base_gguf is None and name.startswith(builtin.PREFIX):
        base_gguf = str(builtin.gguf_file(name))
    if base_gguf is None:
        raise UserError(
            f"--to gguf --merged: {name} did not come from a GGUF, and its vocabulary has to come from one; name a "
            "GGUF of the base (--base-gguf FILE), or export --to merged and run llama.cpp's convert_hf_to_gguf.py on it"
        )
    try:
        return gguf.GGUFReader(base_gguf)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--base-gguf {base_gguf}: cannot be read as GGUF ({str(error)[:200]})") from error


def _type(shape: list[int], dtype: str) -> gguf.GGMLQuantizationType:
    return GGUF_TYPES["float32" if len(shape) == 1 else dtype]


def _in_order(value: Tensor, num_heads: int | None) -> Tensor:
    return value if num_heads is None else to_rotary_order(value, num_heads)


def _check_same(where: str, ours: dict[str, list[int]], theirs: dict[str, Any]) -> None:
    """Raise unless the base's GGUF has the tensors, of the shapes, that are going to be written."""
    shapes = {name: tensor.shape.tolist()[::-1] for name, tensor in theirs.items() if name not in _COMPUTED}
    for name in sorted({*ours, *shapes}):
        if ours.get(name) != shapes.get(name):
            raise UserError(
                f"--base-gguf {where}: {name} is {shapes.get(name, 'missing')} there, {ours.get(name, 'missing')} in "
                "the base; name a GGUF of the same model"
            )


def _check_end_token(where: str, reader: gguf.GGUFReader, fields: dict[str, Any], source: AdapterSource) -> None:
    """Raise unless the run's end token has the same number in the GGUF's vocabulary."""
    field = reader.get_field(gguf.Keys.Tokenizer.LIST)
    if field is None or gguf.Keys.Tokenizer.EOS_ID not in fields or source.tokenizer is None:
        return
    number, _ = fields[gguf.Keys.Tokenizer.EOS_ID]
    ours = read_tokenizer(source.tokenizer).convert_ids_to_tokens(number)
    theirs = field.contents(number) if number < len(field.data) else "nothing"
    if theirs != ours:
        raise UserError(
            f"--base-gguf {where}: token {number} is {theirs!r} there, but the run's end token {ours!r} has that "
            "number; name a GGUF made of the base with the run's tokenizer"
        )


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, run_fields: dict[str, Any]) -> None:
    """Copy what a GGUF says of itself, less what the writer or the run says, or what was said of the old tensors."""
    for name, (value, kind) in run_fields.items():
        writer.add_key_value(name, value, kind)
    general = gguf.Keys.General
    replaced = {general.ARCHITECTURE, general.FILE_TYPE, general.QUANTIZATION_VERSION, *run_fields}
    for field in reader.fields.values():
        if field.name in replaced or field.name.startswith(("GGUF.", "split.", "quantize.")):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
