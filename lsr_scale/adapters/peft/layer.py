"""PEFT's tuner layer for any method: a frozen linear plus the update; forward, merge, unmerge, several adapters."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lsr_scale.adapters.peft.base_weight import factors_of_weight
from lsr_scale.adapters.peft.config import AdapterConfig
from lsr_scale.adapters.peft.method import AdapterMethod, LowRankPair, Pair, Params, upcast
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import freeze_quantized


def in_out_features(layer: nn.Module) -> tuple[int, int] | None:
    """Return `(in_features, out_features)` of a supported base layer, else None.

    Never read off `weight.shape`: 4-bit weights are `[n, 1]` and ZeRO-3's are empty.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return None


def module_suffixes(names: Iterable[str]) -> set[str]:
    """Return the last parts of modules' names, as `target_modules` takes them; the indices of layers left out."""
    return {suffix for name in names if not (suffix := name.rpartition(".")[2]).isdigit()}


def version_counters(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Return each tensor's version counter, which in-place changes raise; None if one is an inference tensor.

    Those have no counter. What was computed of tensors may be cached as long as this, and not None, is returned.
    """
    tensors = list(tensors)
    return None if any(tensor.is_inference() for tensor in tensors) else tuple(tensor._version for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class WeightedSumConfig:
    """What a layer has of an adapter by `add_weighted_adapter` in place of an `AdapterConfig`: scalings are in `up`."""

    method: ClassVar[type[AdapterMethod]] = LowRankPair
    scaling: float = 1.0


class PerSampleUpdate(Protocol):
    """The updates of a batch whose samples use different adapters (`per_sample.py`)."""

    def is_of_this_thread(self) -> bool:
        """Tell whether the calling thread runs that batch."""
        ...

    def add_to(self, result: Tensor, x: Tensor, layer: "AdapterLinear") -> Tensor:
        """Return `result` plus the update of each sample of `x` at a layer."""
        ...


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer plus `scaling * delta_weight`, for any method, with any number of named adapters.

    `y = base_layer(x) + sum_active scaling * up (down dropout(x))`. Factors are float32 (float64 on a float64 base)
    whatever the base's dtype; the pair is materialized in that dtype, the scaling folded in, and cast once to the dtype
    of `x`. In eval mode without gradients the pair is cached until a factor changes.
    """

    cast_input_dtype_enabled = False

    def __init__(self, base_layer: nn.Module, method: type[AdapterMethod]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.method = method
        size = in_out_features(self.get_base_layer())
        assert size is not None
        self.in_features, self.out_features = size
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.adapter_layer_names = tuple(method.prefix + name for name in method.parameter_names)
        self.frozen_layer_names = tuple(method.prefix + name for name in method.frozen_names)
        self.other_param_names = ("adapter_configs", "adapter_dropout", *self.frozen_layer_names)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.frozen_layer_names:
            setattr(self, name, BufferDict(persistent=False))
        self.adapter_configs: dict[str, AdapterConfig | WeightedSumConfig] = {}
        self.adapter_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._pair_cache: dict[tuple[str, torch.dtype], tuple[Any, Pair]] = {}
        self.per_sample: PerSampleUpdate | None = None  # set while a batch's samples use different adapters

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
            # initialized on the CPU, so that a seed gives the same adapter on every device
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta" if weight.is_meta else "cpu"))
            container = getattr(self, self.method.prefix + name)
            container[adapter_name] = parameter
            params[name] = container[adapter_name].data
        if not any(value.is_meta for value in params.values()):
            self.method.init_parameters(params, config)
        self._add_frozen(adapter_name, config, params, dtype)
        self.adapter_configs[adapter_name] = config
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _add_frozen(self, adapter_name: str, config: AdapterConfig, params: Params, dtype: torch.dtype) -> None:
        """Add the factors that are made of the base's weight, and have those that train start where they shall."""
        base: Any = self.get_base_layer()
        shapes = self.method.frozen_shapes(self.in_features, self.out_features, config)
        if not shapes:
            return
        if base.weight.is_meta:
            made = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        else:
            made = factors_of_weight(base, self.method, config, dtype)
        for name, value in made.items():
            if name in shapes:
                getattr(self, self.method.prefix + name)[adapter_name] = value
            elif not params[name].is_meta:
                params[name].copy_(value)

    def add_weighted_sum(self, adapter_name: str, down: Tensor, up: Tensor) -> None:
        """Add a frozen adapter that is its pair, under LoRA's parameter names: PEFT saves it as a LoRA adapter."""
        if not hasattr(self, "lora_A"):
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_A", "lora_B")
        for container, matrix in ((self.lora_A, down), (self.lora_B, up)):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix.detach().contiguous(), requires_grad=False)
            container[adapter_name] = linear
        self.adapter_configs[adapter_name] = WeightedSumConfig()
        self.adapter_dropout[adapter_name] = nn.Identity()

    def method_of(self, adapter_name: str) -> type[AdapterMethod]:
        """Return the method of an adapter: the layer's, but for weighted sums of adapters."""
        return self.adapter_configs[adapter_name].method if adapter_name in self.adapter_configs else self.method

    def cast_factors(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Store an adapter's factors that train in another dtype; they are materialized in float32 all the same."""
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container:
                container[adapter_name] = container[adapter_name].to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device; unlike PEFT's own, the dtype stays."""
        target = device if device is not None else self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, *self.frozen_layer_names):
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].is_meta:
                container[adapter_name] = container[adapter_name].to(target)

    def factors(self, adapter_name: str) -> Params:
        """Return the factors of an adapter by the method's names, the parameters themselves, then the frozen ones."""
        # nn.Module's own dictionaries: access by attribute takes twenty times as long, in every step
        modules: Any = self._modules
        if "lora_A" in modules and adapter_name in modules["lora_A"]:
            return {"down": modules["lora_A"][adapter_name].weight, "up": modules["lora_B"][adapter_name].weight}
        containers = [modules[name]._parameters for name in self.adapter_layer_names if not name.startswith("lora_")]
        by_name = zip(self.method.parameter_names, containers, strict=True)
        found = {name: container[adapter_name] for name, container in by_name if adapter_name in container}
        return found | self.frozen_factors(adapter_name) if self.frozen_layer_names else found

    def frozen_factors(self, adapter_name: str) -> Params:
        """Return the factors of an adapter that are made of the base's weight, by the method's names."""
        modules: Any = self._modules
        by_name = zip(self.method.frozen_names, self.frozen_layer_names, strict=True)
        buffers = {name: modules[container]._buffers for name, container in by_name}
        return {name: value[adapter_name] for name, value in buffers.items() if adapter_name in value}

    def pair(self, adapter_name: str, dtype: torch.dtype) -> Pair:
        """Return `materialize`'s pair of an adapter, in eval mode without gradients from a cache."""
        if self.training or torch.is_grad_enabled():
            return self.materialize(adapter_name, dtype)
        factors = self.factors(adapter_name).values()
        versions = version_counters(factors)
        if versions is None:
            return self.materialize(adapter_name, dtype)
        key = versions, [p.data_ptr() for p in factors], self.adapter_configs[adapter_name].scaling
        cached = self._pair_cache.get((adapter_name, dtype))
        if cached is None or cached[0] != key:
            cached = key, self.materialize(adapter_name, dtype)
            self._pair_cache[adapter_name, dtype] = cached
        return cached[1]

    def materialize(self, adapter_name: str, dtype: torch.dtype) -> Pair:
        """Return `(down [R, in], scaling * up [out, R])` of an adapter, computed in float32 and cast to `dtype`."""
        with torch.autocast(cast(Tensor, self.get_base_layer().weight).device.type, enabled=False):
            down, up = self.method_of(adapter_name).materialize(upcast(self.factors(adapter_name)))
            up = up * self.adapter_configs[adapter_name].scaling
        return down.to(dtype), up.to(dtype)

    def train(self, mode: bool = True) -> "AdapterLinear":
        """Switch between training and evaluation; the pair cache is cleared (an engine may write factors unseen)."""
        self._pair_cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `base_layer(x)` plus the active adapters' updates, `[..., out_features]`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.per_sample is not None and self.per_sample.is_of_this_thread():
            return self.per_sample.add_to(result, x, self)
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
                factors = upcast(self.factors(adapter_name))
                delta = self.method.delta_forward(factors, dropped) * self.adapter_configs[adapter_name].scaling
            result = result + delta.to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `scaling * delta_weight` of an adapter in the layout of the base weight (transposed for Conv1D)."""
        with torch.no_grad():
            delta = self.method_of(adapter).delta_weight(upcast(self.factors(adapter)))
            delta = delta * self.adapter_configs[adapter].scaling
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; a quantized one is dequantized, changed and re-quantized, with loss.

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
            unmerged = (weight.float() if weight.dtype.itemsize < 4 else weight) - self.get_delta_weight(adapter_name)
            self._set_base_weight(unmerged.to(weight.dtype))

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
