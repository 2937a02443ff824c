"""The adapter on disk: saved whole or not at all, and loaded only onto the base that it belongs to."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from lsr_scale import distributed, record
from lsr_scale.errors import UserError
from lsr_scale.identity import base_description, check_base


def is_sharded(model: Any) -> bool:
    """Tell whether ZeRO-3 holds only a part of the parameters here."""
    return any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters())


def save_adapter(trainer: Trainer, target: Path) -> None:
    """Save the adapter as PEFT does, with `base.json` beside it; the folder appears whole, or the old one stays.

    Under ZeRO-3 the factors are gathered first. Every tensor's shape is checked against the method's own.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    state = None
    if is_sharded(trainer.model):
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not distributed.is_main():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=state)
        (aside / "base.json").write_text(json.dumps(base_description(model), indent=1) + "\n")
        _check_saved(aside)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error


def _check_saved(folder: Path) -> None:
    """Assert that no empty tensor was saved, which a sharded model gives when it is not gathered."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        empty = [name for name in names if math.prod(file.get_slice(name).get_shape()) == 0]
    assert names, "no tensors in the adapter"
    assert not empty, f"empty tensors in the adapter: {empty[:3]}"


def load_adapter(base: Any, folder: Path, trainable: bool = False) -> tuple[PeftModel, list[str]]:
    """Return the base with a saved adapter in it, and differences from its training that a user should know.

    Raises:
        UserError: if the adapter is missing, damaged, or from another base model (shapes named).
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: there is no adapter in this folder (adapter_config.json is missing)")
    record.read_json(folder / "adapter_config.json", "adapter's configuration")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: there is no such file; save the adapter again")
    try:
        with safe_open(weights, "pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: damaged or cut short ({error}); restore it or train again") from error
    described = folder / "base.json"
    notes = ["there is no base.json beside the adapter, so its base model could not be checked"]
    if described.is_file():
        notes = check_base(record.read_json(described, "base model's description"), base, str(folder))
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except UserError:
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: this adapter does not fit the base model: {str(error)[:600]}") from error
    return model, notes
