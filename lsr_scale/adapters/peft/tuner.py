"""PEFT's tuner model for any method: which modules are adapted, and weighted sums of adapters."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lsr_scale.adapters.low_rank import lora_config, truncate
from lsr_scale.adapters.packing import is_packed, unpack
from lsr_scale.adapters.peft.base_weight import BaseMark, check_mark
from lsr_scale.adapters.peft.config import AdapterConfig
from lsr_scale.adapters.peft.layer import AdapterLinear, in_out_features, module_suffixes
from lsr_scale.adapters.peft.method import AdapterMethod
from lsr_scale.adapters.peft.per_sample import adapters_per_sample
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.units import amount

# Parameters of one module's adapter, if it is larger than the matrix it adapts: more are refused, fewer warned of, for
# tests take tiny models.
MAX_OVERSIZED_PARAMETERS = 1_000_000

# Where neither PEFT nor the user names target modules: the attention projections that LoRA's defaults take elsewhere.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "mpnet": ["q", "v"],
    "distilbert": ["q_lin", "v_lin"],
    # transformers renamed these attributes within the supported range
    **dict.fromkeys(("vit", "dinov2"), r".*\.(query|value|q_proj|v_proj)"),
    **{name: ["q_proj", "v_proj"] for name in ("clip", "clip_vision_model", "clip_text_model")},
    "gemma3": ["q_proj", "v_proj"],
    "qwen2_moe": ["q_proj", "v_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}


class AdapterModel(BaseTuner):
    """PEFT's tuner model for any method: finds the target modules, checks them all, then wraps them."""

    method: ClassVar[type[AdapterMethod]]
    tuner_layer_cls = AdapterLinear
    bank: Any = None  # the `AdapterBank` in which `adapter_names` are looked up, if any
    target_module_mapping = DEFAULT_TARGETS  # pyright: ignore[reportAssignmentType]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        text_config = model_config.get("text_config") or {}
        sizes = (
            source.get(name)
            for source in (model_config, text_config)
            for name in ("hidden_size", "n_embd", "dim", "d_model")
        )
        self.method.prepare_config(peft_config, next((size for size in sizes if isinstance(size, int)), None))
        return peft_config

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Unpack factors that were exported in 8 or 4 bits; the rest is PEFT's."""
        if is_packed(state_dict):
            state_dict = unpack(state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does; where its frozen factors are made of the base's weights, note those.

        Raises:
            UserError: if it was saved with factors that this base does not give.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if now := BaseMark.of_model(model, adapter_name):
            if stored := BaseMark.of_config(config):
                check_mark(stored, now, f"adapter {adapter_name!r} of {config.base_model_name_or_path}")
            else:
                config.base_sketch, config.base_quantization = now

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target before the first one is touched: a refused injection leaves the model as it was."""
        config = cast(AdapterConfig, _maybe_include_all_linear_layers(peft_config, model))
        modules = dict(model.named_modules())
        inside = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
        names = [name for name in modules if name and not name.startswith(inside)]
        targets = [name for name in names if self._check_target_module_exists(config, name)]
        self._check_all_matched(config, names, targets)
        problems, oversized = [], {}
        for name in targets:
            layer = modules[name]
            layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            size = in_out_features(layer)
            if size is None:
                problems.append(
                    f"{name}: a {type(layer).__name__} is not a linear layer; leave it out of target_modules"
                )
                continue
            module_config = config.for_module(name)
            try:
                shapes = self.method.parameter_shapes(*size, module_config)
            except UserError as error:
                problems.append(f"{name}: {error}")
                continue
            number = sum(math.prod(shape) for shape in shapes.values())
            if number > math.prod(size):
                line = (
                    f"the adapter has {number:,} parameters, more than the {math.prod(size):,} of the matrix that it "
                    f"adapts ({size[1]} x {size[0]}); lower rank (separation_rank), or leave the module out of "
                    "target_modules"
                )
                if number > MAX_OVERSIZED_PARAMETERS and not config.inference_mode:  # a trained one can be loaded
                    problems.append(f"{name}: {line}")
                    continue
                oversized.setdefault(line, []).append(name)
            for line in self.method.oversized_sides(*size, module_config):
                oversized.setdefault(line, []).append(name)
        if problems:
            more = f"\n... and {amount(len(problems) - 8, 'more module')}" if len(problems) > 8 else ""
            raise UserError("\n".join(problems[:8]) + more)
        for line, where in oversized.items():
            more = f" and {len(where) - 1} more of that shape" if len(where) > 1 else ""
            warnings.warn(f"{where[0]}{more}: {line}", stacklevel=2)

    @staticmethod
    def _check_all_matched(config: AdapterConfig, names: list[str], targets: list[str]) -> None:
        target_modules = config.target_modules
        suffixes = module_suffixes(names)
        if isinstance(target_modules, str):
            if not targets:
                raise UserError(
                    f"target_modules: {target_modules!r} matches no module; {did_you_mean(target_modules, suffixes)}"
                )
            return
        for entry in sorted(target_modules or ()):
            if not any(name == entry or name.endswith("." + entry) for name in names):
                known = suffixes if "." not in entry else names
                raise UserError(f"target_modules: {entry!r} matches no module; {did_you_mean(entry, known)}")
        if not targets:
            raise UserError(
                f"target_modules: {sorted(target_modules or ())} match no module once exclude_modules and "
                "layers_to_transform are applied; widen one of them"
            )
        for field in dataclasses.fields(config):
            for pattern in getattr(config, field.name) or () if field.name.endswith("_pattern") else ():
                if field.name != "layers_pattern" and not any(re.match(rf"(.*\.)?({pattern})$", n) for n in targets):
                    hint = did_you_mean(pattern, module_suffixes(targets))
                    raise UserError(f"{field.name}: {pattern!r} matches no adapted module; {hint}")

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(AdapterConfig, peft_config).for_module(current_key)
        if isinstance(target, AdapterLinear):
            target.update_layer(adapter_name, config, peft_config.inference_mode)
            return
        freeze_quantized(target)
        layer = AdapterLinear(target, self.method)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            # an additional adapter is frozen until `set_adapter`
            for name in layer.adapter_layer_names:
                getattr(layer, name).requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Wrap a layer, or put a base layer back; also a head of several modules, which has no weight to copy."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast factors to float32, or with `autocast_adapter_dtype=False` to the dtype that the base computes in."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.modules():
            if isinstance(layer, AdapterLinear) and not autocast_adapter_dtype:
                base: Any = layer.get_base_layer()
                dtype = base.weight.dtype if base.weight.is_floating_point() else getattr(base, "compute_dtype", None)
                layer.cast_factors(adapter_name, dtype or torch.float32)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add the weighted sum of adapters, exactly: their pairs concatenated, a frozen LoRA adapter that PEFT saves.

        Args:
            adapters: Names of the summands.
            weights: One each, of any sign.
            adapter_name: A new name, for the sum.
            combination_type: "cat", exact, its rank the sum of the ranks; or "svd", the best sum of rank `svd_rank`.
            svd_rank: For "svd"; by default the largest rank of the summands at a layer.

        Raises:
            UserError: for adapters that are not there or have no low-rank form, modules_to_save, or another type.
        """
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, AdapterLinear)}
        self._check_weighted_sum(adapters, weights, adapter_name, combination_type)
        ranks: dict[str, int] = {}
        for name, layer in layers.items():
            summands = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if layer.factors(adapter)]
            if not summands:
                continue
            dtype = next(iter(layer.factors(summands[0][0]).values())).dtype
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
            with torch.no_grad():
                pairs = [(*layer.materialize(adapter, dtype), weight) for adapter, weight in summands]
                down = torch.cat([down for down, _, _ in pairs])
                up = torch.cat([weight * up for _, up, weight in pairs], 1)
                if combination_type == "svd":
                    max_rank = max(len(one) for one, _, _ in pairs)
                    down, up, _ = truncate(down, up, svd_rank or max_rank)
            layer.add_weighted_sum(adapter_name, down, up)
            ranks[name] = len(down)
        self.peft_config[adapter_name] = lora_config(ranks, self.peft_config[adapters[0]], target_modules=sorted(ranks))

    def _check_weighted_sum(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
    ) -> None:
        where = "add_weighted_adapter"
        if combination_type not in ("cat", "svd"):
            raise UserError(
                f"{where}: combination_type {combination_type!r} combines factors, and those of {self.method.name} do "
                "not add; valid: cat (exact), svd (the best of a smaller rank)"
            )
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"{where}: expected a finite weight for each adapter, got {len(adapters)} and {weights}")
        for name in adapters:
            if name not in self.peft_config:
                raise UserError(f"{where}: no adapter {name!r}; {did_you_mean(name, self.peft_config)}")
        if adapter_name in self.peft_config:
            raise UserError(f"{where}: there is an adapter {adapter_name!r} already; delete it, or give another name")
        if not self.method.is_low_rank():
            raise UserError(
                f"{where}: {self.method.name} has no low-rank form; merge the adapters into the base instead"
            )
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and any(
                adapter in module.modules_to_save for adapter in adapters
            ):
                raise UserError(f"{where}: {name} is in modules_to_save, fully trained, which does not add")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Have each sample of the batch use its adapter of `adapter_names`, for one forward pass or generation."""
        if kwargs.get("adapter_names") is None:
            yield
            return
        with adapters_per_sample(self, self.method, self.bank, args, kwargs):
            yield
