"""A full model: the adapter added to the base that it was trained on, one weight at a time.

    W = dequantize(quantize(W0)) + scaling * up down

The base's own safetensors files are read tensor by tensor; each linear layer that training held in 4 or 8 bits goes
through the same quantization and back, the pair is added in float32, and files of at most `SHARD_BYTES` are written.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lsr_scale.adapters.packing import checked_cast
from lsr_scale.errors import UserError
from lsr_scale.exporting.source import WRAPPER, AdapterSource
from lsr_scale.layers.frozen_linear import dequantize
from lsr_scale.model import DTYPES, head_modules, load_config, meta_model, quantization_config, resolve
from lsr_scale.model.folder_checks import read_json
from lsr_scale.model.load_errors import explain_load_errors
from lsr_scale.model.tokenizer import copy_tokenizer, end_tokens, has_tokenizer, read_tokenizer, same_state
from lsr_scale.screen import Progress

SHARD_BYTES = 2**28


class MergedWeights:
    """The weights of an adapted model, made one at a time from the base's files."""

    def __init__(self, source: AdapterSource, section: dict[str, Any], kind: str) -> None:
        """Check that base and adapter fit.

        Args:
            source: The adapter.
            section: Arguments of `load_base` for its base.
            kind: What `--to` was, for messages.

        Raises:
            UserError: if the base has no safetensors files, or quantized ones, or an adapted layer is not among their
                tensors.
        """
        if section["random_weights"]:
            raise UserError(
                f"--to {kind}: the run's base has random weights, which lie in no file; merging them is no use"
            )
        self.is_classifier = section["task"] == "seq_cls"
        if source.extra and not self.is_classifier:
            raise UserError(
                f"--to {kind}: {sorted(source.extra)[0]} is fully trained (modules_to_save); export lora, and merge "
                "with PEFT"
            )
        self.source = source
        self.config: Any = load_config(section["name"], section["revision"])
        if getattr(self.config, "quantization_config", None) is not None:
            raise UserError(
                f"--to {kind}: the weights of {section['name']!r} are quantized already, and an update is added to "
                "those that they were made of: name these, a folder or hub name, with --base, or export lora"
            )
        self.path = Path(resolve(section["name"]))
        if not self.path.is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["*.safetensors*", "*.json", "*.jinja", "*.txt", "tokenizer*"]
            with explain_load_errors(section["name"], section["revision"]):
                folder = snapshot_download(section["name"], revision=section["revision"], allow_patterns=patterns)
            self.path = Path(folder)
        self.files = _files(self.path)
        self.dtype = DTYPES[section["dtype"]]
        self.meta_model = meta_model(self.config, section["task"], section["num_labels"], dtype=self.dtype)
        self.heads = {name.removeprefix(WRAPPER): value for name, value in source.extra.items()}
        self.quantized = _Quantized(self.meta_model, section, self.dtype)
        names = dict(self.meta_model.named_parameters(remove_duplicate=False)) | dict(self.meta_model.named_buffers())
        # what a tensor of the files is called in the model; a language model's head has no place in a classifier
        named = {name: self._name(name, names) for file in self.files for name, _ in _shapes(file)}
        self.names = {name: own for name, own in named.items() if own is not None}
        self.shapes = {
            self.names[name]: shape for file in self.files for name, shape in _shapes(file) if name in self.names
        }
        if self.is_classifier:
            self._check_heads()
        lacking = sorted(f"{module}.weight" for module in source.modules if f"{module}.weight" not in self.shapes)
        unknown = sorted(set(self.shapes) - set(names))
        if lacking or unknown:
            raise UserError(
                f"{self.path}: its tensors have other names than the model's ({(lacking or unknown)[0]}); load it, and "
                "merge with PEFT's merge_and_unload"
            )

    def _name(self, name: str, names: Mapping[str, Any]) -> str | None:
        """Return the model's name of a tensor of the base's files, None where it is not part of a classifier."""
        if not self.is_classifier:
            return name
        prefix = f"{self.meta_model.base_model_prefix}."
        own = name if name in names or name.startswith(prefix) else f"{prefix}{name}"  # a bare encoder's have none
        if own in self.heads or (own not in names and not any(own.startswith(part) for part in self._parts(prefix))):
            return None
        return own

    def _parts(self, prefix: str) -> set[str]:
        """Return what the names of the base's own tensors begin with, such as `model.layers.`."""
        base: Any = self.meta_model.base_model
        return {f"{prefix}{name}." for name, _ in base.named_children()}

    def _check_heads(self) -> None:
        """Raise where anything but the classifier's own head is fully trained."""
        names = set(self.meta_model.state_dict())
        other = sorted(set(self.heads) - names) + sorted(
            name for name in self.heads if name.startswith(f"{self.meta_model.base_model_prefix}.")
        )
        if other:
            raise UserError(
                f"--to merged: {other[0]} is fully trained (modules_to_save); export lora, and merge with PEFT"
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors: what was quantized or adapted in float32, the others as training held them."""
        yield from self.heads.items()
        for file in self.files:
            for in_file, _ in _shapes(file):
                name = self.names.get(in_file)
                if name is None:
                    continue
                with safe_open(file, "pt") as opened:  # again for each: what was mapped would count as memory in use
                    value = opened.get_tensor(in_file)
                if value.is_floating_point():
                    value = value.to(self.dtype)
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module in self.quantized.layers:
                    value = self.quantized.seen(module, value)
                if name.endswith(".weight") and module in self.source.modules:
                    value = _merged(value.float(), module, self.source, self.quantized)
                yield name, value


def write_merged(
    folder: Path,
    source: AdapterSource,
    section: dict[str, Any],
    dtype: str,
    metadata: dict[str, str],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a Transformers folder of the adapted model.

    Args:
        folder: An existing, empty folder.
        source: The adapter.
        section: Arguments of `load_base` for its base.
        dtype: "bfloat16", "float32", or "nf4", which quantizes the sum again.
        metadata: Of the safetensors files.
        progress: Shows which tensor it is at.

    Returns:
        What the model card says: tensors, bytes, and for nf4 the relative error of the merged weights.

    Raises:
        UserError: if the base has no safetensors files, or an adapted layer is not among their tensors.
    """
    weights = MergedWeights(source, section, "merged")
    requantize = dtype == "nf4"
    out_dtype = weights.dtype if requantize else DTYPES[dtype]
    writer = _Shards(folder, metadata)
    errors: list[float] = []
    for name, value in (progress or Progress(quiet=True)).over(weights, len(weights.shapes), "tensor"):
        module = name.removesuffix(".weight")
        if requantize and name.endswith(".weight") and module in weights.quantized.linears:
            packed, error = weights.quantized.again(module, value)
            errors += [error] if module in source.modules else []
            for part, tensor in packed.items():
                writer.add(f"{module}.{part}", tensor)
        else:
            writer.add(name, checked_cast(value, out_dtype, name) if value.is_floating_point() else value)
    writer.finish()
    written: dict[str, Any] = weights.config.to_dict()
    written.pop("quantization_config", None)
    written["dtype"] = str(out_dtype).removeprefix("torch.")
    written["architectures"] = [type(weights.meta_model).__name__]
    if weights.is_classifier:
        names = section["labels"] or [f"LABEL_{number}" for number in range(section["num_labels"])]
        written["id2label"] = {str(number): name for number, name in enumerate(names)}
        written["label2id"] = {name: number for number, name in enumerate(names)}
    if requantize:
        again = quantization_config("nf4", True, weights.dtype, head_modules(weights.meta_model))
        assert again is not None
        written["quantization_config"] = again.to_dict()
    if (weights.path / "generation_config.json").is_file():
        shutil.copyfile(weights.path / "generation_config.json", folder / "generation_config.json")
    _write_tokenizer(folder, weights.path, source.tokenizer, written)
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    summary: dict[str, Any] = {"dtype": dtype, "files": len(writer.files), "bytes of tensors": writer.total}
    if errors:
        summary["relative error of quantizing again, median"] = float(f"{sorted(errors)[len(errors) // 2]:.3g}")
    return summary


def _write_tokenizer(folder: Path, base: Path, saved: Path | None, config: dict[str, Any]) -> None:
    """Write the run's tokenizer, and its end token into both configurations.

    The base's own files are copied where they say the same: other programs know their format longest.
    """
    tokenizer: Any = read_tokenizer(saved) if saved is not None else None
    if saved is None or (has_tokenizer(base) and same_state(tokenizer, read_tokenizer(base))):
        copy_tokenizer(base, folder)
    else:
        copy_tokenizer(saved, folder)
    if tokenizer is not None and tokenizer.pad_token_id is not None and "id2label" in config:
        config["pad_token_id"] = tokenizer.pad_token_id  # by which a decoder finds the last token of a row
    if tokenizer is None or tokenizer.eos_token_id is None:
        return
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    theirs = generation.get("eos_token_id", config.get("eos_token_id"))
    if tokenizer.eos_token_id not in (theirs if isinstance(theirs, list) else [theirs]):
        generation["eos_token_id"] = end_tokens(tokenizer, theirs)
        file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        config["eos_token_id"] = tokenizer.eos_token_id


def _merged(weight: Tensor, module: str, source: AdapterSource, quantized: "_Quantized") -> Tensor:
    """Add a module's update to a float32 weight in the file's layout, in place."""
    transposed = module in quantized.transposed
    if source.is_low_rank:
        down, up = source.pair(module)
        left, right = (down.T, up.T) if transposed else (up, down)
        shape = [left.shape[0], right.shape[1]]
    else:
        delta = source.delta(module)
        left, right = delta.T if transposed else delta, None
        shape = list(left.shape)
    if list(weight.shape) != shape:
        raise UserError(f"{source.folder}: {module}: the update is of {shape}, the base has {list(weight.shape)} there")
    return weight.add_(left) if right is None else weight.addmm_(left, right)


class _Quantized:
    """The linear layers of a base that training holds quantized, and what quantization makes of their weights."""

    def __init__(self, empty: Any, section: dict[str, Any], dtype: torch.dtype) -> None:
        self.kind, self.dtype = section["quantization"], dtype
        self.double = section.get("double_quantization", True)
        self.transposed = {name for name, module in empty.named_modules() if isinstance(module, Conv1D)}
        heads = set(head_modules(empty) or ())
        # those that can be quantized, and those that training held so
        self.linears = {
            name
            for name, module in empty.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name.split(".")[0] not in heads
        }
        self.layers = set() if self.kind == "none" else self.linears

    def _layer(self, weight: Tensor, kind: str, double: bool) -> Any:
        new: Any
        out_features, in_features = weight.shape
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
            new = bnb.nn.Int8Params
            layer.weight = new(weight, has_fp16_weights=False, requires_grad=False)
        else:
            options = {"compress_statistics": double, "quant_type": kind}
            layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, device="meta", **options)
            new = bnb.nn.Params4bit
            layer.weight = new(weight, requires_grad=False, module=layer, **options)
        return layer.to("cpu")

    def seen(self, module: str, weight: Tensor) -> Tensor:
        """Return the weight that training saw, float32, in the layout given."""
        straight = weight.T if module in self.transposed else weight
        seen = dequantize(self._layer(straight.contiguous(), self.kind, self.double), torch.float32)
        return seen.T.contiguous() if module in self.transposed else seen

    def again(self, module: str, weight: Tensor) -> tuple[dict[str, Tensor], float]:
        """Return the tensors of an NF4 layer as bitsandbytes stores it, and the relative error of its weight."""
        straight = (weight.T if module in self.transposed else weight).contiguous()
        layer = self._layer(straight.to(self.dtype), "nf4", True)
        back = dequantize(layer, torch.float32)
        return dict(layer.state_dict()), float((back - straight).norm() / straight.norm())


class _Shards:
    """Safetensors files of a limited size, and the index that Transformers reads."""

    def __init__(self, folder: Path, metadata: dict[str, str]) -> None:
        self.folder, self.metadata = folder, {"format": "pt", **metadata}
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total = 0
        self.files: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        """Hold a tensor until its file is full."""
        size = value.numel() * value.element_size()
        if self.held and self.held_bytes + size > SHARD_BYTES:
            self._flush()
        # a copy: what is mapped from the base's file would otherwise be held until the flush
        self.held[name] = value.contiguous().clone()
        self.held_bytes += size
        self.total += size

    def _flush(self) -> None:
        save_file(self.held, self.folder / f"part-{len(self.files)}.safetensors", metadata=self.metadata)
        self.files.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left; name the files and write their index."""
        self._flush()
        if len(self.files) == 1:
            (self.folder / "part-0.safetensors").rename(self.folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self.files):
            name = f"model-{number + 1:05}-of-{len(self.files):05}.safetensors"
            (self.folder / f"part-{number}.safetensors").rename(self.folder / name)
            places |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _files(path: Path) -> list[Path]:
    """Return the safetensors files of a base; what an index names has to lie in the folder."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if (path / "model.safetensors").is_file():
            return [path / "model.safetensors"]
        raise UserError(f"{path}: there are no safetensors weights here; other formats are not read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({error}); fetch the model again") from error
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong:
        raise UserError(f"{index}: {wrong[0]!r} is not the name of a file in this folder; fetch the model again")
    return [path / name for name in names]


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_slice(name).get_shape()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or missing ({error}); fetch the model again") from error
