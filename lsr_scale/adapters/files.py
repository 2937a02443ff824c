"""The adapter on disk: saved whole or not at all, and loaded only onto the base that it belongs to."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Trainer

from lsr_scale import distributed, files
from lsr_scale.adapters.identity import base_description, check_base
from lsr_scale.adapters.saved import BASE, check_own_base, read_base, read_config, read_weights
from lsr_scale.errors import UserError
from lsr_scale.layers.fp32_modules import cast_modules_to_save
from lsr_scale.model.shard import is_sharded
from lsr_scale.paths import user_path
from lsr_scale.run.folder import ADAPTER_FILES

# torch's words for two tensors that should be of one shape
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]")


def save_adapter(trainer: Trainer, target: Path) -> None:
    """Save the adapter as PEFT does, with `base.json` beside it; the folder appears whole, or the old one stays.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    if not distributed.is_main():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    aside = target.with_name(f".{target.name}.part")
    files.remove(aside)
    try:
        write_adapter(model, aside)
        files.apply_umask(aside)
        files.replace_folder(aside, target, ADAPTER_FILES)
    except (OSError, SafetensorError) as error:
        raise _cannot_save(target, error) from error
    finally:
        files.remove(aside)


def write_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, with `base.json` beside it; nothing of a sharded base, such as embeddings.

    Raises:
        RuntimeError: for an empty tensor, which is a bug.
    """
    trained = None
    if is_sharded(model):
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(folder, state_dict=trained)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, to be filled in; an export has a card
    (folder / "base.json").write_text(json.dumps(base_description(model), indent=1) + "\n")
    _check_saved(folder)


def _cannot_save(target: Path, error: OSError | SafetensorError) -> UserError:
    return files.cannot_write(target, files.system_error(error) or OSError(str(error)))


def _check_saved(folder: Path) -> None:
    """Raise if an empty tensor was saved, which a sharded model gives when it is not gathered."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        empty = [name for name in names if math.prod(file.get_slice(name).get_shape()) == 0]
    if not names:
        raise RuntimeError("no tensors in the adapter")
    if empty:
        raise RuntimeError(f"empty tensors in the adapter: {empty[:3]}")


def load_adapter(base: Any, folder: Path, trainable: bool = False) -> tuple[PeftModel, list[str]]:
    """Return the base with a saved adapter in it, and differences from its training that a user should know.

    Raises:
        UserError: if the adapter is missing, damaged, or from another base model (shapes named).
    """
    config = read_config(folder)
    check_own_base(folder, config)
    stored = read_weights(folder)
    notes = check_description(base, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            model = PeftModel.from_pretrained(base, folder, is_trainable=trainable, config=config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        shapes = [f"{name}: [{a}] in the file, [{b}] in the model" for name, a, b in _MISMATCH.findall(str(error))]
        words = "\n" + "\n".join(_first(shapes)) if shapes else f" {str(error)[:600]}"
        raise UserError(f"{folder}: this adapter does not fit the base model:{words}") from error
    wrong = _misfits(model, stored)
    if wrong:
        raise UserError(f"{folder}: the weights are not those that adapter_config.json describes\n" + "\n".join(wrong))
    cast_modules_to_save(model, folder)
    return model, notes


def check_description(base: Any, folder: Path) -> list[str]:
    """Return how a base differs from that in the `base.json` beside an adapter, in ways that a user should know.

    Raises:
        UserError: if its layers have other shapes.
    """
    described = read_base(folder)
    if described is None:
        return [f"there is no {BASE} beside the adapter, so its base model could not be checked"]
    return check_base(described, base, str(folder))


# of no meaning once there are factors, or none for training; names that PEFT has for our options
_FREE = {"init", "init_lora_weights", "init_weights", "runtime_config"}
_OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "rank_dropout": "dropout"}


def find_start(path: str, wanted: PeftConfig) -> Path:
    """Return the folder of an earlier adapter, its method and options those that a run has.

    Args:
        path: Folder of a run, or of an adapter as PEFT saves it, packed factors included.
        wanted: The configuration that the run has.

    Raises:
        UserError: if there is no such adapter, or it is of another method or other options.
    """
    folder = user_path(path, "adapter.start_from")
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not folder.is_dir():
        raise UserError(f"adapter.start_from: {folder}: no such folder; name that of a run or of an adapter")
    saved = read_config(folder)
    check_own_base(folder, saved)
    if type(saved) is not type(wanted):
        kinds = [getattr(config.peft_type, "value", str(config.peft_type)).lower() for config in (saved, wanted)]
        raise UserError(
            f"adapter.start_from: {folder} holds an adapter of {kinds[0]}, but adapter.method is {kinds[1]}; "
            "set it alike"
        )
    bookkeeping = {field.name for field in dataclasses.fields(PeftConfig)} | _FREE
    lines = []
    for name in (field.name for field in dataclasses.fields(wanted) if field.name not in bookkeeping):
        here, there = getattr(wanted, name), getattr(saved, name)
        # null and auto are resolved by the model, as is all-linear
        if here not in (None, "auto", "all-linear", there):
            lines.append(f"adapter.{_OURS.get(name, name)}: {_shown(here)} in the run, {_shown(there)} in the adapter")
    if lines:
        raise UserError(
            f"adapter.start_from: {folder} was trained with other options; set them alike\n" + "\n".join(_first(lines))
        )
    return folder


def _shown(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, set) else repr(value)


def misfits(model: Any, folder: Path) -> list[str]:
    """Return a line for every tensor that an adapter's file and a model with that adapter do not share, six at most."""
    return _misfits(model, read_weights(folder))


def _misfits(model: Any, weights: Mapping[str, Tensor]) -> list[str]:
    stored = {name: list(value.shape) for name, value in weights.items()}
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: list(tensor.shape) for name, tensor in held.items()}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[model.active_peft_config.peft_type]
    # PEFT saves a whole embedding beside the factors where it was adapted
    names = sorted(name for name in {*stored, *shapes} if name in shapes or prefix in name)
    lines = [
        f"{name}: {stored.get(name, 'missing')} in the file, {shapes.get(name, 'missing')} in the model"
        for name in names
        if stored.get(name) != shapes.get(name)
    ]
    return _first(lines)


def _first(lines: list[str]) -> list[str]:
    return [*lines[:6], f"... and {len(lines) - 6} more"] if len(lines) > 6 else lines
