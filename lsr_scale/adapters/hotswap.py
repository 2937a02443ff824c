"""Hotswapping: a saved adapter replaces an injected one in place (PEFT's `hotswap_adapter` is for LoRA only)."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter as hotswap_lora
from torch import Tensor, nn

from lsr_scale.adapters.identity import check_base
from lsr_scale.adapters.peft import AdapterConfig, AdapterLinear, check_own_factors
from lsr_scale.adapters.read import read_base, read_config, read_weights
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import user_path


def hotswap_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Replace the factors, scalings and dropout of an injected adapter by those of a saved one; its name stays.

    Factors of the same shape are copied in place, so that what refers to them (a compiled model, a CUDA graph) stays
    valid; others, as of another rank, are replaced. Linears that the new adapter does not adapt get zeros.

    Args:
        model: With an adapter of the same method; LoRA is passed on to PEFT's own function.
        folder: The new adapter's, as `save_pretrained` writes it; packed factors too.
        adapter_name: The adapter that is replaced.

    Raises:
        UserError: if there is no such adapter, or the new one is damaged, of another method or base, adapts other
            linears, or has modules_to_save. The model is unchanged then.
    """
    folder = user_path(folder)
    if adapter_name not in model.peft_config:
        raise UserError(
            f"hotswap_adapter: no adapter {adapter_name!r}; {did_you_mean(adapter_name, model.peft_config)}"
        )
    old_config: Any = model.peft_config[adapter_name]
    config = read_config(folder)
    if type(config) is not type(old_config):
        methods = [str(one.peft_type.value).lower() for one in (config, old_config)]
        raise UserError(f"{folder}: a {methods[0]} adapter cannot replace one of {methods[1]}")
    stored = read_weights(folder)
    if not isinstance(config, AdapterConfig):
        device = str(next(model.parameters()).device)
        try:
            return hotswap_lora(model, str(folder), adapter_name, torch_device=device)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{folder}: PEFT cannot swap it in: {str(error)[:300]}") from error
    # of another rank too it would need other frozen factors than are there
    check_own_factors(config, old_config, str(folder))
    described = read_base(folder)
    if described is not None:
        check_base(described, model, str(folder))
    if any(isinstance(m, ModulesToSaveWrapper) and adapter_name in m.modules_to_save for m in model.modules()):
        raise UserError(f"hotswap_adapter: {adapter_name!r} has modules_to_save; call delete_adapter, and load_adapter")
    replacements = _match_factors(model, config, stored, adapter_name, folder)
    for layer, (module_config, factors) in replacements.items():
        _replace_factors(layer, adapter_name, factors)
        if module_config is not None:
            layer.adapter_configs[adapter_name] = module_config
            dropout = module_config.dropout
            layer.adapter_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
    config.inference_mode = old_config.inference_mode
    model.peft_config[adapter_name] = config


def _match_factors(
    model: PeftModel, config: AdapterConfig, stored: dict[str, Tensor], adapter_name: str, folder: Path
) -> dict[AdapterLinear, tuple[AdapterConfig | None, dict[str, Tensor]]]:
    """Return each linear's new factors, and its new configuration, None where the new adapter does not adapt it."""
    replacements: dict[AdapterLinear, tuple[AdapterConfig | None, dict[str, Tensor]]] = {}
    unmatched = dict(stored)
    for name, layer in model.named_modules():
        if not isinstance(layer, AdapterLinear) or not (old := layer.factors(adapter_name)):
            continue
        if adapter_name in layer.merged_adapters:
            raise UserError(f"hotswap_adapter: {adapter_name!r} is merged into the base; call unmerge_adapter() first")
        module_config = config.for_module(name.removeprefix("base_model.model."))
        names = {key: f"{name}.{layer.method.prefix}{key}" for key in layer.method.parameter_names}
        factors = {key: unmatched.pop(stored_name) for key, stored_name in names.items() if stored_name in unmatched}
        if not factors:
            replacements[layer] = None, {key: torch.zeros_like(value) for key, value in old.items()}
            continue
        expected = layer.method.parameter_shapes(layer.in_features, layer.out_features, module_config)
        shapes = {key: tuple(value.shape) for key, value in factors.items()}
        if shapes != expected:
            raise UserError(f"{folder}: {name}: its configuration asks for {expected}, the file has {shapes}")
        replacements[layer] = module_config, factors
    if unmatched:
        raise UserError(
            f"{folder}: {min(unmatched)} is of no linear that {adapter_name!r} adapts, nor are {len(unmatched) - 1} "
            "more; call delete_adapter, and load_adapter"
        )
    return replacements


@torch.no_grad()
def _replace_factors(layer: AdapterLinear, adapter_name: str, factors: dict[str, Tensor]) -> None:
    old = layer.factors(adapter_name)
    for key in layer.method.parameter_names:
        container = getattr(layer, layer.method.prefix + key)
        if key in factors and key in old and factors[key].shape == old[key].shape:
            old[key].copy_(factors[key])
        elif key in factors:
            like = next(iter(old.values()))
            container[adapter_name] = nn.Parameter(factors[key].to(like), requires_grad=like.requires_grad)
        elif key in old:  # a factor that the new adapter has not, such as term_weights
            del container[adapter_name]
