"""Checks of a model's folder before Transformers opens a file of it: its config.json, and weights that are safetensors.

Nothing here loads a weight.
"""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from lsr_scale.errors import UserError, shortened
from lsr_scale.paths import is_special_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# what Transformers may open in a model's folder
_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken"}
# fields of config.json that are at least 1; the widest published model has 53,248 features
_SIZES = re.compile(r"num_(?:hidden_)?layers|n_layers?|vocab_size|(hidden_size|intermediate_size|n_embd|d_model)")
MAX_FEATURES = 10**6
MAX_JSON_BYTES = 64 * 2**20  # the index of the largest published models, of 200,000 tensors, has 20 MiB
# Each of these is a module or a row: the most in published models are 126 layers, 512 experts and 21,841 labels.
_MAX = {"layers": 1_000, "experts": 10_000, "labels": 1_000_000}
_COUNTED = re.compile(r"(?:num_|n_)?(?:\w+_)?(layers?|experts|labels)")
# fields that a step computes with, which no shape depends on
_PROBABILITIES = re.compile(r"\w*(?:dropout|pdrop)(?:_prob|_rate|_p)?")
_EPSILONS = re.compile(r"(?:\w+_)?eps(?:ilon)?")

_INTEGERS = {"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}  # safetensors' names of dtypes


def check_folder(name: str, folder: Path) -> None:
    """Refuse a run's folder, and one with a pipe or device under the name of a file: reading it would never end.

    Raises:
        UserError: naming it.
    """
    names = {path.name for path in folder.iterdir()}
    if {"config.yaml", "env.json"} <= names and "config.json" not in names:
        raise UserError(
            f"model.name {name!r}: a run's folder, where a model is expected; to train its adapter further name its "
            f"base, and set adapter.start_from: {name}; to train on what it made: lsr-scale export {shlex.quote(name)} "
            "--to merged --out FOLDER, and name that"
        )
    for path in folder.iterdir():
        if path.suffix in _SUFFIXES and is_special_file(path):
            raise UserError(f"model.name {name!r}: {path.name} in this folder is no file; expected a plain file")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        UserError: for a file that cannot be read, is no JSON, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON configuration ({error}); fetch the model again") from error
    return content


def check_config(file: Path, content: dict[str, Any]) -> None:
    """Refuse a config.json with numbers that no model has, or with code from the hub.

    Raises:
        UserError: naming the file and the field.
    """
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(content.get(key) or ""):
            raise UserError(f"{file}: {key} names code from the hub, which is never run here; remove that line")
    published = content.get("architectures")
    if published is not None and not (isinstance(published, list) and all(isinstance(name, str) for name in published)):
        raise UserError(f"{file}: architectures: expected a list of names, got {str(published)[:80]}")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key, value in part.items():
            wrong = _wrong_number(key, value)
            if wrong:
                raise UserError(f"{file}: {key} is {value}; {wrong}, fetch the model again or mend that line")
            size = _SIZES.fullmatch(key)
            if size and isinstance(value, int | float) and (value <= 0 or (size[1] and value > MAX_FEATURES)):
                most = f", and at most {MAX_FEATURES:,}" if size[1] else ""
                raise UserError(
                    f"{file}: {key} is {shortened(str(value), 24)}; a model has at least one{most}, fetch it again"
                )
            counted = _COUNTED.fullmatch(key)
            if counted is None or not isinstance(value, int | float):
                continue
            kind = counted[1] if counted[1].endswith("s") else f"{counted[1]}s"
            if value > _MAX[kind]:
                raise UserError(
                    f"{file}: {key} is {shortened(str(value), 24)}; no model has more than {_MAX[kind]:,} {kind}, "
                    "fetch it again"
                )
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
            raise UserError(
                f"{file}: num_key_value_heads is {shortened(str(shared), 24)}; expected a divisor of "
                f"num_attention_heads ({shortened(str(heads), 24)}), fetch it again"
            )


def _wrong_number(key: str, value: Any) -> str | None:
    """Return what was expected instead of a number that would fail at the first step, None for another."""
    if key == "attention_dropout" and value is None:
        return "expected a number from 0 to 1"  # any other dropout may be null
    if not isinstance(value, int | float):
        return None
    if isinstance(value, float) and math.isnan(value):  # isnan does not take large integers
        return "expected a number"
    if _PROBABILITIES.fullmatch(key) and not 0 <= value <= 1:
        return "expected a number from 0 to 1"
    if _EPSILONS.fullmatch(key) and not 0 <= value < math.inf:
        return "expected a finite number that is not negative"
    return None


def check_weights(name: str, folder: Path, auto_class: str, config: dict[str, Any]) -> None:
    """Refuse a folder without complete safetensors, or whose index names files outside it.

    Args:
        name: The model's name, for messages.
        folder: Its folder.
        auto_class: Transformers' class that loads it, for the command that converts pickles.
        config: Content of its config.json.

    Raises:
        UserError: naming the file, and the command that converts a pickle.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.name {name!r}: there is an adapter_config.json in this folder, and Transformers would load that "
            "adapter and its base instead; move it elsewhere"
        )
    chosen = config.get("transformers_weights")  # a file name other than the usual one
    if chosen is not None and not (isinstance(chosen, str) and chosen.endswith((".safetensors", INDEX[5:]))):
        raise UserError(f"{folder / 'config.json'}: transformers_weights: expected a safetensors file, got {chosen!r}")
    files = weight_files(folder, chosen)
    if not files and any((folder / pickled).is_file() for pickled in PICKLES):
        raise UserError(
            f"model.name {name!r}: its weights are a pickle ({PICKLES[0]}), which can run code as it is read; only "
            "safetensors are loaded. If you trust where it is from, convert it once:\n" + convert(folder, auto_class)
        )
    if not files:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".bin", ".pt")
        )
        there_is = f" (there is {', '.join(others[:3])})" if others else ""
        raise UserError(
            f"model.name {name!r}: there is no {WEIGHTS} or {INDEX} in its folder{there_is}; fetch it again"
        )
    allowed = _allowed_folders(folder)
    quantized = any("quantization_config" in part for part in (config, *config.values()) if isinstance(part, dict))
    for file in files:
        _check_inside(file, allowed)
        try:
            with safe_open(file, "pt") as weights:
                integers = None if quantized else _integer_weight(weights)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: a weight file is damaged or cut short ({error}); fetch the model again"
            ) from error
        if integers:
            raise UserError(
                f"{file}: {integers[:200]!r} has integers, though config.json has no quantization_config that says "
                "what they stand for; fetch the model again"
            )


def weight_files(folder: Path, chosen: str | None = None) -> list[Path]:
    """Return the safetensors files that Transformers loads of a folder, of all that lie there; [] where it has none.

    Args:
        folder: A model's folder.
        chosen: `transformers_weights` of its config.json: a file name other than the usual ones.

    Raises:
        UserError: for an index that cannot be read, or names files that are not there.
    """
    single, index = (folder / chosen,) * 2 if chosen else (folder / WEIGHTS, folder / INDEX)
    if not index.name.endswith(".json") or (not chosen and single.is_file()):
        return [single]
    return _shards(index) if index.is_file() else []


def convert(folder: Path, auto_class: str) -> str:
    """Return the command that writes safetensors beside a folder's pickled weights."""
    code = f"import sys, transformers as t; t.{auto_class}.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"
    return f"python -c '{code}' {shlex.quote(str(folder))}"


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, all of which exist."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{index}: expected a weight_map from tensors to files; fetch the model again")
    files = []
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{index}: names {shard[:80]!r}; expected safetensors files beside it, by their plain names"
            )
        if not (index.parent / shard).is_file():
            raise UserError(f"{index}: names {shard}, which is not there; fetch the model again")
        files.append(index.parent / shard)
    return files


def _integer_weight(weights: Any) -> str | None:
    """Return the name of an integer weight of an open safetensors file, which Transformers would silently cast."""
    names = (name for name in weights.keys() if name.endswith(".weight"))  # noqa: SIM118
    return next((name for name in names if weights.get_slice(name).get_dtype() in _INTEGERS), None)


def _allowed_folders(folder: Path) -> list[Path]:
    """Return the folders that a model's weights may be in: its own, and the hub's cache, whose files are links."""
    own = folder.resolve()
    folders = [own, Path(constants.HF_HUB_CACHE).expanduser().resolve()]
    if own.parent.name == "snapshots":  # of a cache, whose files are links to blobs
        folders.append(own.parent.parent)
    return folders


def _check_inside(file: Path, allowed: list[Path]) -> None:
    target = file.resolve()
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise UserError(
            f"{file}: is a link out of the model's folder, to {target}; put the file itself there, or name its folder"
        )
