"""Saving an adapter, atomically, and loading it, onto the base that it belongs to only."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer

from lsr_scale import distributed, files
from lsr_scale.adapters.card import CARD_NAME, front_matter, loading, loading_code, table, write_card
from lsr_scale.adapters.identity import base_description, check_base
from lsr_scale.adapters.read import (
    ADAPTER_FILES,
    BASE_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_own_base,
    portable_base,
    read_base,
    read_config,
    read_weights,
)
from lsr_scale.errors import UserError
from lsr_scale.layers.fp32_modules import cast_modules_to_save
from lsr_scale.model.shard import is_sharded
from lsr_scale.paths import user_path

# torch's message of two tensors whose shapes differ
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]")


def save_adapter(trainer: Trainer, target: Path) -> None:
    """Save the adapter as PEFT does, with `base.json` and a card beside it; an interrupted save leaves the old folder.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    if not distributed.is_main():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    temporary = files.temporary_path(target)
    files.remove_stale_temporaries(target)
    try:
        write_adapter(model, temporary, target)
        files.apply_umask(temporary)
        files.replace_folder(temporary, target, (*ADAPTER_FILES, CARD_NAME))
    except (OSError, SafetensorError) as error:
        raise files.cannot_write(target, error) from error
    finally:
        files.remove(temporary)


def write_adapter(model: Any, folder: Path, target: Path | None = None) -> None:
    """Write the adapter as PEFT does, with `base.json` and a card beside it; nothing of a sharded base, as embeddings.

    Args:
        model: With the adapter in it.
        folder: Where to write.
        target: Where the folder is to lie, for the card.

    Raises:
        RuntimeError: for an empty tensor, which is a bug.
    """
    kept = None
    if is_sharded(model):
        frozen = {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}
        kept = {name: value for name, value in _saved_tensors(model).items() if name not in frozen}
    elif not any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        kept = _saved_tensors(model)
    # a reference beside it, of DPO or KTO, is not what was trained
    model.save_pretrained(folder, state_dict=kept, selected_adapters=["default"])
    described = base_description(model)
    if labels := label_names(model.config):
        described["labels"] = labels
    (folder / BASE_NAME).write_text(json.dumps(described, indent=1) + "\n")
    _name_base(folder / CONFIG_NAME, described)
    _write_card(model, described["name"], folder, target or folder)  # in place of PEFT's template
    _check_saved(folder)


def _name_base(file: Path, described: dict[str, Any]) -> None:
    """Have PEFT's configuration name a built-in base as the hub does; PEFT itself would look there, told before."""
    content = json.loads(file.read_text(encoding="utf-8"))
    name = portable_base(content["base_model_name_or_path"], described)
    if name != content["base_model_name_or_path"]:
        content["base_model_name_or_path"] = name
        file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _write_card(model: Any, base: str, folder: Path, target: Path) -> None:
    config = model.peft_config["default"]
    method = str(config.peft_type.value).lower()
    counts = {"base": base, "method": method, "trained parameters": f"{model.get_nb_trainable_parameters()[0]:,}"}
    lines = [*front_matter(base, "peft", method, config.task_type), "", f"# {method} adapter", "", *table(counts)]
    dtype = str(model.dtype).removeprefix("torch.")
    outputs, labels = getattr(model.config, "num_labels", 0), label_names(model.config)
    code = loading_code(config, base, target, dtype, outputs, labels)
    write_card(folder, [*lines, *loading(config, target, code)])


def label_names(config: Any) -> list[str]:
    """Return the names of a classifier's labels, none where its configuration has only transformers' own."""
    names = [config.id2label[number] for number in sorted(config.id2label or {})]
    return [] if all(re.fullmatch("LABEL_[0-9]+", str(name)) for name in names) else names


def _check_saved(folder: Path) -> None:
    """Raise if an empty tensor was saved: a sharded one that was not all-gathered."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
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
    notes = check_base_of(folder, base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            model = PeftModel.from_pretrained(base, folder, is_trainable=trainable, config=config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        shapes = [f"{name}: [{a}] in the file, [{b}] in the model" for name, a, b in _MISMATCH.findall(str(error))]
        details = "\n" + "\n".join(_shortened(shapes)) if shapes else f" {str(error)[:600]}"
        raise UserError(f"{folder}: this adapter does not fit the base model:{details}") from error
    mismatches = _mismatches(model, stored)
    if mismatches:
        raise UserError(f"{folder}: the weights are not those that {CONFIG_NAME} describes\n" + "\n".join(mismatches))
    cast_modules_to_save(model, folder)
    return model, notes


def load_in_place(model: PeftModel, folder: Path) -> list[str] | None:
    """Put a saved adapter's tensors in place of those of a model's own, where that is what `load_adapter` would give.

    That saves the injection into every module. Tensors are copied, so what refers to them stays valid; frozen factors
    that are made of the base's weights stay.

    Args:
        model: What `load_adapter` returned for an adapter that is not needed any more.
        folder: The next adapter's.

    Returns:
        What `load_adapter` notes; None, the model unchanged, where the adapter must be injected: its configuration or
        the names and shapes of its tensors are not those of the model's own, either has fully trained modules or
        embeddings, or the model has another adapter, or one that is merged.

    Raises:
        UserError: if the adapter is missing, damaged, or from another base model.
    """
    config = read_config(folder)
    check_own_base(folder, config)
    if list(model.peft_config) != ["default"] or not _alike(config, model.peft_config["default"]):
        return None
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and module.merged):
            return None
    stored, live = read_weights(folder), _saved_tensors(model)
    state = get_peft_model_state_dict(model, live, save_embedding_layers=False)
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in state.items()}:
        return None
    if not {value.data_ptr() for value in state.values()} <= {value.data_ptr() for value in live.values()}:
        return None  # a method that computes what it saves
    notes = check_base_of(folder, model)
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(stored[name])  # counted by the tensor's version, by which pairs are cached
    return notes


def _alike(one: PeftConfig, other: PeftConfig) -> bool:
    """Tell whether two configurations are of one class, and differ in nothing but whether they train."""
    return type(one) is type(other) and all(
        getattr(one, field.name) == getattr(other, field.name)
        for field in dataclasses.fields(one)
        if field.name != "inference_mode"
    )


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers as `state_dict()` names and orders them.

    The state of quantized weights, which quantized linears add to it, is left out: to pack it takes longer than all
    else of saving an adapter.
    """
    return {
        f"{path}.{name}" if path else name: tensor.detach()
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def check_base_of(folder: Path, base: Any) -> list[str]:
    """Return how a base differs from the one in the `base.json` beside an adapter, in ways that a user should know.

    Raises:
        UserError: if its layers have other shapes, or a classifier's labels have other names or another order.
    """
    described = read_base(folder)
    if described is None:
        return [f"there is no {BASE_NAME} beside the adapter, so its base model could not be checked"]
    labels, now = described.get("labels"), label_names(base.config)
    if labels and now and labels != now:
        raise UserError(
            f"{folder}: was trained on the labels {', '.join(map(str, labels))[:200]} in this order, and these are "
            f"{', '.join(now)[:200]}; set model.labels to its own"
        )
    return check_base(described, base, str(folder))


# options that may differ in `adapter.start_from`: of the initialization, or of no meaning for training
_NOT_COMPARED = {
    "init",
    "init_rows",
    "base_sketch",
    "base_quantization",
    "init_lora_weights",
    "init_weights",
    "runtime_config",
}
# our names of PEFT's options
_OPTION_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "rank_dropout": "dropout"}


def resolve_start_from(path: str, config: PeftConfig) -> Path:
    """Return the folder of the adapter that `adapter.start_from` names, of the same method and options as the run.

    Args:
        path: Folder of a run, or of an adapter as PEFT saves it, packed factors included.
        config: The run's configuration.

    Raises:
        UserError: if there is no such adapter, or it is of another method or other options.
    """
    folder = user_path(path, "adapter.start_from")
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not folder.is_dir():
        raise UserError(f"adapter.start_from: {folder}: no such folder; name that of a run or of an adapter")
    saved = read_config(folder)
    check_own_base(folder, saved)
    if type(saved) is not type(config):
        methods = [getattr(one.peft_type, "value", str(one.peft_type)).lower() for one in (saved, config)]
        raise UserError(
            f"adapter.start_from: {folder} holds an adapter of {methods[0]}, but adapter.method is {methods[1]}; "
            "set it alike"
        )
    not_options = {field.name for field in dataclasses.fields(PeftConfig)} | _NOT_COMPARED
    differences = []
    for name in (field.name for field in dataclasses.fields(config) if field.name not in not_options):
        here, there = getattr(config, name), getattr(saved, name)
        # null and auto are resolved by the model, as is all-linear
        if here not in (None, "auto", "all-linear", there):
            option = _OPTION_NAMES.get(name, name)
            differences.append(f"adapter.{option}: {_shown(here)} in the run, {_shown(there)} in the adapter")
    if differences:
        raise UserError(
            f"adapter.start_from: {folder} was trained with other options; set them alike\n"
            + "\n".join(_shortened(differences))
        )
    return folder


def _shown(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, set) else repr(value)


def weight_mismatches(model: Any, folder: Path) -> list[str]:
    """Return a line for each tensor whose shape differs between an adapter's file and a model with it, six at most."""
    return _mismatches(model, read_weights(folder))


def _mismatches(model: Any, weights: Mapping[str, Tensor]) -> list[str]:
    stored = {name: list(value.shape) for name, value in weights.items()}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[model.active_peft_config.peft_type]
    # PEFT saves the embedding itself beside the factors where it was adapted
    names = sorted(name for name in {*stored, *shapes} if name in shapes or prefix in name)
    lines = [
        f"{name}: {stored.get(name, 'missing')} in the file, {shapes.get(name, 'missing')} in the model"
        for name in names
        if stored.get(name) != shapes.get(name)
    ]
    return _shortened(lines)


def _shortened(lines: list[str]) -> list[str]:
    return [*lines[:6], f"... and {len(lines) - 6} more"] if len(lines) > 6 else lines
