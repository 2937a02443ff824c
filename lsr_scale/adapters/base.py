"""What PEFT asks of any method, written once: a config, a tuner model, a linear layer, and the registration.

A method (one file beside this one) only says what its factors are and how they make the update:
`delta_weight(params)`, the dense definition, and `materialize(params) -> (down [R, in], up [out, R])`, the exact
low-rank form that the forward pass, the fused path and the exports share. Everything here is method-blind.
"""

import copy
import dataclasses
import functools
import math
import re
import sys
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    quantization_extra_repr,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lsr_scale.adapters.checks import check_options
from lsr_scale.adapters.low_rank import lora_config, truncate
from lsr_scale.adapters.rows import BASE_ROW, MIXED_WHOLE, NamedRows, Pair, Rows, add_rows, lock_of, whole_by_rows
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.packed_factors import is_packed, unpack

Params = dict[str, Tensor]
# Of one module's adapter. With fewer, one that is larger than its matrix is warned of only: tests take tiny models.
MANY_PARAMETERS = 1_000_000
Shapes = dict[str, tuple[int, ...]]

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


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default (a class such as `dict` is a default factory) and a help text."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class AdapterConfig(PeftConfig):
    """The options every method has; a method's own config adds its own.

    An option `name` of a method becomes settable per module by a field `name_pattern`: a mapping from the end of a
    module's name, or a regular expression for it, to the value there (PEFT's rule for `rank_pattern`).
    """

    target_modules: list[str] | str | None = option(
        None, "Names (or one regular expression) of the modules to adapt, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = option(None, "Names (or one regular expression) of modules to leave out.")
    rank: int = option(8, "Rank of the adapter.")
    alpha: float | None = option(None, "Numerator of the scaling alpha / rank.")
    dropout: float = option(0.0, "Dropout on the adapter's input, in training; 0 keeps the fast path.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    rank_pattern: dict[str, int] = option(dict, "Rank by module.")
    alpha_pattern: dict[str, float] = option(dict, "Alpha by module.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list, if layers_to_transform needs it.")
    modules_to_save: list[str] | None = option(None, "Modules trained whole and saved with the adapter.")

    method: ClassVar[type["AdapterMethod"]]

    def __post_init__(self) -> None:
        """Validate the values that no model is needed for."""
        super().__post_init__()
        self.peft_type = PeftType(self.method.name.upper())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple | set):
                setattr(self, name, set(value))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        check_options(vars(self))
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise UserError("layers_pattern: only has a meaning with layers_to_transform; set both or neither")

    def for_module(self, module_name: str) -> "AdapterConfig":
        """Return a copy with every `*_pattern` applied to the module of that name."""
        config = copy.copy(self)
        for field in dataclasses.fields(self):
            name = field.name.removesuffix("_pattern")
            if name != field.name and hasattr(self, name):
                pattern = getattr(self, field.name)
                setattr(config, name, pattern.get(get_pattern_key(pattern, module_name), getattr(self, name)))
        return config

    @property
    def scaling(self) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv 2312.03732)."""
        assert self.alpha is not None
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class AdapterMethod(ABC):
    """One adapter method: pure functions of shapes and tensors, any floating dtype, no modules.

    `params` maps the names in `parameter_shapes` to tensors. The update of the weight is
    `scaling * delta_weight(params)`; the scaling is not the method's concern.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    parameter_names: ClassVar[tuple[str, ...]]
    # sums of Kronecker products, `sum_k <side>_left[k] (x) <side>_right[k]`, whose condition is watched
    sides: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def parameter_shapes(in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shape of every factor for a linear layer; raise UserError for impossible ones."""

    @staticmethod
    @abstractmethod
    def init_parameters(params: Params, config: Any) -> None:
        """Fill the factors in place."""

    @staticmethod
    @abstractmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return the unscaled dense update `[out, in]`: the method's definition, slow and obvious."""

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the exact pair `(down [R, in], up [out, R])` with `up @ down == delta_weight(params)`.

        The factors may carry equal leading dimensions (a stack of modules of one shape); so does the pair then.
        A method whose update has no small rank leaves this out and defines `delta_forward`.
        """
        raise NotImplementedError

    @classmethod
    def delta_forward(cls, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return `x @ delta_weight^T` `[..., out]`, unscaled, in the dtype of `x`."""
        down, up = cls.materialize(params)
        return functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))

    @classmethod
    def is_low_rank(cls) -> bool:
        """Tell whether the method has a `materialize`, and with it the fused path and the exact exports."""
        return cls.materialize is not AdapterMethod.materialize

    @classmethod
    def prepare_config(cls, config: Any, hidden_size: int | None) -> None:
        """Resolve options that depend on the model, in place; `hidden_size` is None where the model has no config."""
        del config, hidden_size

    @classmethod
    def oversized_sides(cls, in_features: int, out_features: int, config: Any) -> list[str]:
        """Return a line for each side that has more parameters than the dense matrix it stands for."""
        del in_features, out_features, config
        return []


class LowRankPair(AdapterMethod):
    """LoRA's own form, not registered: the factors are the pair. What sums of adapters are held as."""

    name = "lora"
    parameter_names = ("down", "up")

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `up down`."""
        return params["up"] @ params["down"]

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> Pair:
        """Return the factors."""
        return params["down"], params["up"]


@dataclasses.dataclass(frozen=True)
class _SumConfig:
    """What a linear keeps of a weighted sum of adapters, in place of an `AdapterConfig`: scalings are in `up`."""

    method: ClassVar[type[AdapterMethod]] = LowRankPair
    scaling: float = 1.0


METHODS: dict[str, type[AdapterMethod]] = {}


def register(method: type[AdapterMethod]) -> type[AdapterMethod]:
    """Make a method known to PEFT and to this package: the one registration, a class decorator.

    PEFT keys its tables by an enum of its own, so the enum gets a member in memory; no file is changed. The rest is
    PEFT's `register_peft_method`, with its checks for unique names and prefixes.
    """
    member = str.__new__(PeftType, method.name.upper())
    member._name_ = member._value_ = method.name.upper()
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(method.name.upper())
    PeftType._member_map_[method.name.upper()] = member
    PeftType._value2member_map_[method.name.upper()] = member
    type.__setattr__(PeftType, method.name.upper(), member)

    method.config_class.method = method
    tuner = types.new_class(f"{method.__name__}Model", (AdapterModel,))
    tuner.prefix, tuner.method, tuner.__module__ = method.prefix, method, method.__module__  # pyright: ignore
    setattr(sys.modules[method.__module__], tuner.__name__, tuner)  # where pickle looks for it
    register_peft_method(name=method.name, config_cls=method.config_class, model_cls=tuner, prefix=method.prefix)
    METHODS[method.name] = method
    return method


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return `(in_features, out_features)` of a supported base layer, else None.

    Never read off `weight.shape`: 4-bit weights are `[n, 1]` and ZeRO-3's are empty.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return None


def last_names(names: Iterable[str]) -> set[str]:
    """Return the last parts of modules' names, but for the numbers that layers have."""
    return {end for name in names if not (end := name.rpartition(".")[2]).isdigit()}


def upcast(params: Params) -> Params:
    """Return the tensors with half-precision ones in float32: what factors are materialized in."""
    return {name: p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for name, p in params.items()}


def change_counts(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Return how often each tensor was changed in place; None if one was made in inference mode, where nobody counts.

    What was computed of tensors may be kept as long as this, and not None, is returned.
    """
    held = list(tensors)
    return None if any(tensor.is_inference() for tensor in held) else tuple(tensor._version for tensor in held)


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer plus `scaling * delta_weight`, for any method, with any number of named adapters.

    `y = base_layer(x) + sum_active scaling * up (down dropout(x))`. Factors are float32 (float64 on a float64 base)
    whatever the base is held in; the pair is materialized in that dtype, the scaling folded in, and cast once to the
    dtype of `x`. In eval mode without gradients the pair is kept until a factor changes.
    """

    cast_input_dtype_enabled = False

    def __init__(self, base_layer: nn.Module, method: type[AdapterMethod]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.method = method
        size = features(self.get_base_layer())
        assert size is not None
        self.in_features, self.out_features = size
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.adapter_layer_names = tuple(method.prefix + name for name in method.parameter_names)
        self.other_param_names = ("adapter_configs", "adapter_dropout")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.adapter_configs: dict[str, AdapterConfig | _SumConfig] = {}
        self.adapter_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._pair_cache: dict[tuple[str, torch.dtype], tuple[Any, tuple[Tensor, Tensor]]] = {}
        self.rows: Rows | None = None  # the adapters of a batch's rows, while they differ

    def update_layer(self, adapter_name: str, config: AdapterConfig, inference_mode: bool = False) -> None:
        """Add an adapter with freshly initialized factors.

        Args:
            adapter_name: Its name.
            config: The options for this very module (`AdapterConfig.for_module`).
            inference_mode: Leave the factors without gradients.
        """
        weight = self.get_base_layer().weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shapes = self.method.parameter_shapes(self.in_features, self.out_features, config)
        params: Params = {}
        for name, shape in shapes.items():
            # Drawn on the CPU, so that one seed gives one adapter on every device.
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta" if weight.is_meta else "cpu"))
            container = getattr(self, self.method.prefix + name)
            container[adapter_name] = parameter
            params[name] = container[adapter_name].data
        if not any(value.is_meta for value in params.values()):
            self.method.init_parameters(params, config)
        self.adapter_configs[adapter_name] = config
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def add_sum(self, adapter_name: str, down: Tensor, up: Tensor) -> None:
        """Add an adapter that is an exact pair, frozen, under LoRA's names: PEFT saves it as a LoRA adapter."""
        if not hasattr(self, "lora_A"):
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_A", "lora_B")
        for container, matrix in ((self.lora_A, down), (self.lora_B, up)):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix.detach().contiguous(), requires_grad=False)
            container[adapter_name] = linear
        self.adapter_configs[adapter_name] = _SumConfig()
        self.adapter_dropout[adapter_name] = nn.Identity()

    def method_of(self, adapter_name: str) -> type[AdapterMethod]:
        """Return how an adapter's factors make its pair: the layer's method, but for sums of adapters."""
        return self.adapter_configs[adapter_name].method if adapter_name in self.adapter_configs else self.method

    def hold_in(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Hold an adapter's factors in another dtype; they are materialized in float32 all the same."""
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container:
                container[adapter_name] = container[adapter_name].to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device; unlike PEFT's own, the dtype stays."""
        target = device if device is not None else self.get_base_layer().weight.device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].is_meta:
                container[adapter_name] = container[adapter_name].to(target)

    def factors(self, adapter_name: str) -> Params:
        """Return the factors of an adapter by the method's names, the parameters themselves."""
        # where modules keep what is in them: by attribute it takes twenty times as long, in every step
        modules: Any = self._modules
        if "lora_A" in modules and adapter_name in modules["lora_A"]:
            return {"down": modules["lora_A"][adapter_name].weight, "up": modules["lora_B"][adapter_name].weight}
        held = [modules[name]._parameters for name in self.adapter_layer_names if not name.startswith("lora_")]
        names = zip(self.method.parameter_names, held, strict=True)
        return {name: factors[adapter_name] for name, factors in names if adapter_name in factors}

    def params(self, adapter_name: str) -> Params:
        """Return the factors of an adapter by the method's names; half-precision ones are upcast to float32."""
        return upcast(self.factors(adapter_name))

    def pair(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `(down [R, in], scaling * up [out, R])` of an adapter, materialized in float32 and cast to `dtype`."""
        if self.training or torch.is_grad_enabled():
            return self._materialized(adapter_name, dtype)
        held = self.factors(adapter_name).values()
        counts = change_counts(held)
        if counts is None:
            return self._materialized(adapter_name, dtype)
        version = counts, [p.data_ptr() for p in held], self.adapter_configs[adapter_name].scaling
        cached = self._pair_cache.get((adapter_name, dtype))
        if cached is None or cached[0] != version:
            cached = version, self._materialized(adapter_name, dtype)
            self._pair_cache[adapter_name, dtype] = cached
        return cached[1]

    def _materialized(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.autocast(cast(Tensor, self.get_base_layer().weight).device.type, enabled=False):
            down, up = self.method_of(adapter_name).materialize(self.params(adapter_name))
            up = up * self.adapter_configs[adapter_name].scaling
        return down.to(dtype), up.to(dtype)

    def train(self, mode: bool = True) -> "AdapterLinear":
        """Switch between training and evaluation; cached pairs are dropped (an engine may write factors unseen)."""
        self._pair_cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `base_layer(x)` plus the active adapters' updates, `[..., out_features]`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.rows is not None and self.rows.are_this_threads():
            pair = self.rows.pair(self, x.dtype, len(x))
            return result if pair is None else add_rows(result, x, *pair)
        if self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name not in self.adapter_configs:
                continue
            dropped = self.adapter_dropout[adapter_name](x)
            if self.method.is_low_rank():
                down, up = self.pair(adapter_name, x.dtype)
                delta = functional.linear(functional.linear(dropped, down), up)
            else:
                config = self.adapter_configs[adapter_name]
                delta = self.method.delta_forward(self.params(adapter_name), dropped) * config.scaling
            result = result + delta.to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `scaling * delta_weight` of an adapter in the layout of the base weight (transposed for Conv1D)."""
        with torch.no_grad():
            delta = self.method_of(adapter).delta_weight(self.params(adapter)) * self.adapter_configs[adapter].scaling
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; a quantized one is dequantized, changed and quantized again, with loss.

        Args:
            safe_merge: Refuse (UserError) a weight that would not be finite.
            adapter_names: Which adapters; the active ones by default.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.adapter_configs:
                continue
            weight = self.get_base_weight()
            merged = (weight.float() if weight.dtype.itemsize < 4 else weight) + self.get_delta_weight(adapter_name)
            if safe_merge and not torch.isfinite(merged).all():
                raise UserError(f"adapter {adapter_name!r}: merging gives weights that are not finite; do not merge it")
            self._set_base_weight(merged.to(weight.dtype))
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            rest = (weight.float() if weight.dtype.itemsize < 4 else weight) - self.get_delta_weight(adapter_name)
            self._set_base_weight(rest.to(weight.dtype))

    def _set_base_weight(self, weight: Tensor) -> None:
        self.set_base_weight(weight)
        freeze_quantized(self.get_base_layer())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT's LoRA conversion that the update is additive."""
        del adapter_name
        return True

    def extra_repr(self) -> str:
        """Describe the quantization of the base layer in the module's repr."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"{self.method.name}.{super().__repr__()}"


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
                    down, up, _ = truncate(down, up, min(svd_rank or largest, *down.shape, len(up)))
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
