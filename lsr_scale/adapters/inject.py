"""Injecting a fresh adapter into a base model: `train` trains what `plan` counts."""

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lsr_scale import adapters
from lsr_scale.adapters.peft import in_out_features, module_suffixes
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.layers.fp32_modules import cast_modules_to_save
from lsr_scale.model.architecture import head_modules

# the heads of a classifier that PEFT adds to modules_to_save; it would leave others as they were initialized
_PEFT_HEADS = ("classifier", "score")


def inject(base: Any, method: str, options: Mapping[str, Any], task: str) -> PeftModel:
    """Return a base with a fresh adapter injected; a classifier's head is fully trained, whatever its name.

    Args:
        base: The base model, loaded or on the meta device.
        method: One of `adapters.method_names()`.
        options: Its options.
        task: "causal_lm" or "seq_cls".

    Raises:
        UserError: for options that do not fit the base, or targets that it does not have.
    """
    config: Any = adapters.peft_config(method, options, adapters.TASK_TYPES[task])
    if task == "seq_cls":
        _train_heads(base, config)
    _name_linears_of_layers(base, config)
    _check_names(base, config.target_modules)
    try:
        model: Any = get_peft_model(base, config)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter.target_modules: {_refusal(base, config, error)}") from error
    check_linear(model)
    cast_modules_to_save(model)
    return model


def check_linear(model: PeftModel) -> None:
    """Refuse what PEFT's own methods adapt beside linear layers, such as embeddings: exports hold linear layers only.

    Raises:
        UserError: naming the first such layer.
    """
    adapted = {
        path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, BaseTunerLayer)
    }
    linears = [path for path, layer in adapted.items() if in_out_features(layer.get_base_layer())]
    for path, layer in adapted.items():
        if path not in linears:
            kind, name = type(layer.get_base_layer()).__name__, path.rpartition(".")[2]
            if isinstance(layer, ParamWrapper):  # PEFT's all-linear of experts, which no option of ours leaves out
                raise UserError(
                    f"adapter.target_modules: PEFT's LoRA would adapt the parameters of {path} ({kind}) too, and they "
                    f"are no linear layer's; name linear layers, such as {_listed(linears)}"
                )
            raise UserError(
                f"adapter.target_modules: {path}: a layer of type {kind} is not linear; leave it out, or train it "
                f"fully with adapter.modules_to_save: [{name}]"
            )


def _train_heads(base: Any, config: Any) -> None:
    """Put a classifier's heads into modules_to_save, and leave them out of all-linear."""
    heads = [
        name for name, module in base.named_children() if name in (head_modules(base) or ()) and _has_weight(module)
    ]
    unknown = [name for name in heads if not name.endswith(_PEFT_HEADS)]
    if unknown:
        config.modules_to_save = [*(config.modules_to_save or ()), *unknown]
    if config.target_modules == "all-linear":
        inside = [
            name
            for name, module in base.named_modules()
            if name.partition(".")[0] in heads and in_out_features(module) is not None
        ]
        excluded = getattr(config, "exclude_modules", None)  # which not all of PEFT's own methods have as an option
        if isinstance(excluded, str):
            config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, inside)])
        elif inside:
            config.exclude_modules = {*(excluded or ()), *inside}


def _name_linears_of_layers(base: nn.Module, config: Any) -> None:
    """Write the linears' own names in place of all-linear beside layers_to_transform.

    PEFT writes whole names where they are few, and a module that is named wholly is adapted whatever its layer.
    """
    if config.target_modules == "all-linear" and config.layers_to_transform not in (None, []):
        linears = [name for name, module in base.named_modules() if in_out_features(module) is not None]
        inside = [name for name in linears if any(part.isdigit() for part in name.split("."))]
        config.target_modules = {name.rpartition(".")[2] for name in inside}


def _check_names(base: nn.Module, targets: Any) -> None:
    """Refuse a name that matches nothing; PEFT ignores it where another name matches."""
    if targets is None or isinstance(targets, str):
        return
    names = [name for name, _ in base.named_modules() if name]
    for entry in sorted(targets):
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            hint = did_you_mean(entry, module_suffixes(names) if "." not in entry else names)
            raise UserError(f"adapter.target_modules: {entry!r} matches no module; {hint}")


def _refusal(base: Any, config: Any, error: Exception) -> str:
    """Return the message of an injection that PEFT refused."""
    if not config.target_modules:
        body = [name for name, module in base.base_model.named_modules() if in_out_features(module)]
        # where PEFT's default is the experts' parameters it leaves an empty set, and all-linear includes them
        wider = "all-linear, or to " if config.target_modules is None else ""
        return (
            f"there is no default for a {base.config.model_type} model; set it to {wider}names of linear layers, such "
            f"as {_listed(body)}"
        )
    return f"{' '.join(str(error).split())[:400]}; name linear layers only, or all-linear"


def _listed(paths: list[str]) -> str:
    return f"[{', '.join(sorted(module_suffixes(paths))[:8])}]"


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
