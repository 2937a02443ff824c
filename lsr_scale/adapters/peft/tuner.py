"""PEFT's tuner model for any method: which modules are adapted, sums of adapters, an adapter for each sample."""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lsr_scale.adapters.low_rank import lora_config, truncate
from lsr_scale.adapters.packing import is_packed, unpack
from lsr_scale.adapters.peft.config import AdapterConfig
from lsr_scale.adapters.peft.layer import AdapterLinear, features, last_names
from lsr_scale.adapters.peft.method import AdapterMethod
from lsr_scale.adapters.per_sample import BASE_ROW, MIXED_WHOLE, NamedRows, lock_of, whole_by_rows
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.layers.frozen_linear import freeze_quantized

# Of one module's adapter. With fewer, one that is larger than its matrix is warned of only: tests take tiny models.
MANY_PARAMETERS = 1_000_000

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
    bank: Any = None  # an `AdapterBank`, where rows of a batch name adapters that lie in folders
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
            size = features(layer)
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
                if number > MANY_PARAMETERS and not config.inference_mode:  # one that was trained once can be used
                    problems.append(f"{name}: {line}")
                    continue
                oversized.setdefault(line, []).append(name)
            for line in self.method.oversized_sides(*size, module_config):
                oversized.setdefault(line, []).append(name)
        if problems:
            more = f"\n... and {len(problems) - 8} more modules" if len(problems) > 8 else ""
            raise UserError("\n".join(problems[:8]) + more)
        for line, where in oversized.items():
            more = f" and {len(where) - 1} more of that shape" if len(where) > 1 else ""
            warnings.warn(f"{where[0]}{more}: {line}", stacklevel=2)

    @staticmethod
    def _check_all_matched(config: AdapterConfig, names: list[str], targets: list[str]) -> None:
        wanted = config.target_modules
        ends = last_names(names)
        if isinstance(wanted, str):
            if not targets:
                raise UserError(f"target_modules: {wanted!r} matches no module; {did_you_mean(wanted, ends)}")
            return
        for entry in sorted(wanted or ()):
            if not any(name == entry or name.endswith("." + entry) for name in names):
                known = ends if "." not in entry else names
                raise UserError(f"target_modules: {entry!r} matches no module; {did_you_mean(entry, known)}")
        if not targets:
            raise UserError(
                f"target_modules: {sorted(wanted or ())} match no module once exclude_modules and "
                "layers_to_transform are applied; widen one of them"
            )
        for field in dataclasses.fields(config):
            for pattern in getattr(config, field.name) or () if field.name.endswith("_pattern") else ():
                if field.name != "layers_pattern" and not any(re.match(rf"(.*\.)?({pattern})$", n) for n in targets):
                    short = {name.rsplit(".", 1)[-1] for name in targets}
                    raise UserError(
                        f"{field.name}: {pattern!r} matches no adapted module; {did_you_mean(pattern, short)}"
                    )

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
            # an additional adapter is not trainable until it is set
            for name in layer.adapter_layer_names:
                getattr(layer, name).requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Wrap a layer, or put back what was wrapped: also a whole head, which has no weight that PEFT could copy."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Hold factors in float32, or with `autocast_adapter_dtype=False` in the dtype that the base computes in."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.modules():
            if isinstance(layer, AdapterLinear) and not autocast_adapter_dtype:
                base: Any = layer.get_base_layer()
                dtype = base.weight.dtype if base.weight.is_floating_point() else getattr(base, "compute_dtype", None)
                layer.hold_in(adapter_name, dtype or torch.float32)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add the weighted sum of adapters, exactly: their pairs side by side, a frozen LoRA adapter that PEFT saves.

        Args:
            adapters: Names of the summands.
            weights: One each, of any sign.
            adapter_name: A new name, for the sum.
            combination_type: "cat", exact, its rank the sum of the ranks; or "svd", the best sum of rank `svd_rank`.
            svd_rank: For "svd"; by default the largest rank of the summands at a layer.

        Raises:
            UserError: for adapters that are not there or have no low-rank form, modules trained whole, or another type.
        """
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, AdapterLinear)}
        self._check_sum(adapters, weights, adapter_name, combination_type)
        ranks: dict[str, int] = {}
        for name, layer in layers.items():
            held = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if layer.factors(adapter)]
            if not held:
                continue
            dtype = next(iter(layer.factors(held[0][0]).values())).dtype
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
            with torch.no_grad():
                pairs = [(*layer._materialized(adapter, dtype), weight) for adapter, weight in held]
                down = torch.cat([down for down, _, _ in pairs])
                up = torch.cat([weight * up for _, up, weight in pairs], 1)
                if combination_type == "svd":
                    largest = max(len(one) for one, _, _ in pairs)
                    down, up, _ = truncate(down, up, svd_rank or largest)
            layer.add_sum(adapter_name, down, up)
            ranks[name] = len(down)
        self.peft_config[adapter_name] = lora_config(ranks, self.peft_config[adapters[0]], target_modules=sorted(ranks))

    def _check_sum(
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
            if isinstance(module, ModulesToSaveWrapper) and any(held in module.modules_to_save for held in adapters):
                raise UserError(f"{where}: {name} is trained whole (modules_to_save), which does not add")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Have each row of the batch use the adapter that `adapter_names` gives it, for one forward or generation.

        One batch at a time: a second thread waits, since rows and a bank's slots are the model's.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        modules = list(self.modules())
        layers = [layer for layer in modules if isinstance(layer, AdapterLinear)]
        whole: list[Any] = [module for module in modules if isinstance(module, ModulesToSaveWrapper)]
        with self.lock:
            self._check_rows(names, layers, whole)
            for given in (*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds"))):
                if isinstance(given, Tensor) and len(given) != len(names):
                    raise UserError(
                        f"adapter_names: {len(names)} names for a batch of {len(given)} rows; give one for each row"
                    )
            copies = self._copies(kwargs)
            rows = self.bank.rows(names, copies) if self.bank is not None else NamedRows(names, copies)
            try:
                for layer in layers:
                    layer.rows = rows
                for wrapper in whole:
                    wrapper.forward = functools.partial(whole_by_rows, wrapper, names, rows)
                yield
            finally:
                for layer in layers:
                    layer.rows = None
                for wrapper in whole:
                    vars(wrapper).pop("forward", None)

    @property
    def lock(self) -> Any:
        """What a batch holds whose rows name adapters, and whoever changes a bank's slots."""
        return lock_of(self)

    def _copies(self, options: Mapping[str, Any]) -> int:
        """Return how many rows generation makes of one, by its options or the model's: beams, or several answers."""
        default = options.get("generation_config") or getattr(self.model, "generation_config", None)
        counts = ("num_beams", "num_return_sequences")
        return max(int(options.get(name) or getattr(default, name, None) or 1) for name in counts)

    def _check_rows(self, names: Any, layers: Sequence[AdapterLinear], whole: Sequence[ModulesToSaveWrapper]) -> None:
        """Raise UserError where rows of one batch cannot use different adapters."""
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"adapter_names: expected a list with the name of an adapter for each row, got {names!r}"[:200]
            )
        if self.training:
            raise UserError("adapter_names: for evaluation only; call model.eval() first")
        if not self.method.is_low_rank():
            raise UserError(
                f"adapter_names: {self.method.name} has no low-rank form; call the model once per adapter (set_adapter)"
            )
        if any(layer.merged for layer in layers):
            raise UserError("adapter_names: an adapter is merged into the base; call unmerge_adapter() first")
        if self.bank is not None and whole:
            raise UserError("adapter_names: modules_to_save trained a whole module, which a bank does not hold")
        for wrapper in whole:
            if not isinstance(wrapper.original_module, MIXED_WHOLE):
                kind, kinds = type(wrapper.original_module).__name__, ", ".join(k.__name__ for k in MIXED_WHOLE)
                raise UserError(
                    f"adapter_names: modules_to_save trained a {kind}, but rows can differ in {kinds} only; call the "
                    "model once per adapter (set_adapter)"
                )
        known = {BASE_ROW, *(name for layer in layers for name in layer.adapter_configs)}
        unknown = sorted({*names} - known) if self.bank is None else []
        if unknown:
            raise UserError(f"adapter_names: no adapter {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
