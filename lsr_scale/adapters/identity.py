"""The identity of an adapter's base model: a description saved beside it, compared before it is loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lsr_scale.adapters.peft import in_out_features
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import quantization_of
from lsr_scale.model import builtin
from lsr_scale.model.architecture import snapshot_of
from lsr_scale.model.shard import full_numel
from lsr_scale.model.weights_digest import weights_digest


def base_description(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a base model, to be stored beside an adapter: see `check_base`.

    Works on a bare base and on one with adapters in it. `linear_shapes` maps every linear layer, layer numbers
    replaced by `*`, to `[out_features, in_features]`.
    """
    config: Any = model.config
    shapes: dict[str, list[int]] = {}
    quantization = "none"
    num_parameters = 0
    seen: set[int] = set()
    for path, module in base_modules(model):
        size = in_out_features(module)
        if size is not None:
            pattern = ".".join("*" if part.isdigit() else part for part in path.split("."))
            shapes[pattern] = [size[1], size[0]]
            if (held := quantization_of(module)) != "none":
                quantization = held
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                packed = size is not None and parameter is module.weight
                num_parameters += size[0] * size[1] if packed and size else full_numel(parameter)
    return {
        **model_description(config),
        "architecture": (config.architectures or [config.model_type])[0],
        "quantization": quantization,
        "num_parameters": num_parameters,
        "linear_shapes": dict(sorted(shapes.items())),
    }


def model_description(config: Any) -> dict[str, Any]:
    """Return what of a `base_description` a model's configuration and its files say; no weights are loaded for it.

    `commit` is the hub's, of which the files in its cache are; None for a model that is not from there.
    `weights_sha256` is None for a model whose files are not here.
    """
    snapshot = snapshot_of(config)
    content = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_ARCHITECTURE}
    return {
        "name": builtin.name_of(config.name_or_path) or config.name_or_path,
        "config_sha256": hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest(),
        "commit": None if snapshot is None else snapshot.name,
        "weights_sha256": weights_digest(
            snapshot or config.name_or_path, getattr(config, "transformers_weights", None)
        ),
    }


_NOT_ARCHITECTURE = {
    *("_name_or_path", "_attn_implementation", "architectures", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "problem_type"),
    *("id2label", "label2id", "num_labels"),
}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base under the names they have without adapters."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    inside = tuple(f"{path}." for path, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    heads = tuple(f"{path}." for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper))
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        if path.startswith(heads):
            # a wrapper has the trained copies of a head, and the original
            head = next(head for head in heads if path.startswith(head))
            child, _, rest = path.removeprefix(head).partition(".")
            if child == "original_module":
                yield ".".join(part for part in (head[:-1], rest) if part), module
        elif not path.startswith(inside):
            yield path, module
        elif path.endswith("base_layer"):
            yield path.removesuffix(".base_layer"), module


def check_base(stored: Mapping[str, Any], model: nn.Module, where: str) -> list[str]:
    """Compare a saved `base_description` with the base model that its adapter is to be loaded onto.

    Args:
        stored: The description beside the adapter.
        model: The base model.
        where: The adapter's folder, for the message.

    Returns:
        Differences that do not forbid loading, one line each (another name, quantization, or setting).

    Raises:
        UserError: if linear layers have other shapes, or are not there; names them.
    """
    now = base_description(model)
    trained_on, shapes = stored["linear_shapes"], now["linear_shapes"]
    mismatches = [
        f"{path}: {trained_on[path]} -> {shapes.get(path, 'not there')}"
        for path in trained_on
        if trained_on[path] != shapes.get(path)
    ]
    if mismatches:
        more = f"\n... and {len(mismatches) - 6} more" if len(mismatches) > 6 else ""
        raise UserError(
            f"{where}: this adapter was trained on {stored['name']} ({stored['architecture']}), whose layers "
            f"[out, in] have other shapes than those of {now['name']}; load it on its own base\n"
            + "\n".join(mismatches[:6])
            + more
        )
    notes = other_model_notes(stored, now)
    if stored["quantization"] != now["quantization"]:
        quantization = f"{now['quantization']}; that of its training was {stored['quantization']}"
        notes.append(f"the base's quantization is {quantization}")
    return notes


def other_model_notes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return, in a line, how the model of one `model_description` is another than that of the one beside an adapter."""
    if stored["config_sha256"] != now["config_sha256"]:
        return [f"the settings of {now['name']} are not those of {stored['name']}, which it was trained on"]
    if other_weights(stored, now):
        back = "put those back, or name their folder"
        if commit := stored.get("commit"):
            model = "" if stored["name"] == now["name"] else f"model.name: {stored['name']} and "
            back = f"set {model}model.revision: {commit}, or name a folder with the files of that commit (--base)"
        return [
            f"the weights of {now['name']} are not those that it was trained on ({stored['name']}); {back}: what it "
            "learned is a difference to them"
        ]
    return []


def other_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two descriptions, of models with the same settings, are known to be of different weights."""
    digests = {described.get("weights_sha256") for described in (one, other)} - {None}
    return len(digests) > 1
