"""A model's active adapters as pairs in memory that stays where it is: what a CUDA graph reads.

In evaluation a layer keeps its pair until a factor changes, and then makes another one elsewhere, where a graph that
was captured before would not look. Here the new values are written where the old ones were.

PEFT's linears with plain LoRA are among the layers: two products here, where PEFT's own forward has several small
kernels for each linear and token. Their pair is made in float32 and cast once to the dtype of `x`, as in the fused path
that trains them; PEFT computes the update in the factors' dtype, so in bfloat16 the two differ by rounding. They are
of a subclass of their own class meanwhile (`PairedLora`), and of their own class again afterwards.
"""

import functools
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lsr_scale.adapters.pairs import Adapter, active_adapters
from lsr_scale.adapters.peft import AdapterLinear, Pair, upcast
from lsr_scale.adapters.peft.layer import in_out_features
from lsr_scale.adapters.peft.per_sample import PairMemory
from lsr_scale.fused.fallback import skipped_reason
from lsr_scale.fused.subclass import original_class

# exactly these: a subclass may compute something else
PLAIN_LORA = (lora.Linear, Linear4bit, Linear8bitLt)
FACTOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ActivePairs:
    """The pairs of each layer's active adapters, the same for all rows, for the thread that generates."""

    def __init__(self, memory: PairMemory, layers: Collection[nn.Module] = ()) -> None:
        """Take the memory, which the pairs of the generation before may be in, and the layers that have pairs."""
        self.memory, self.layers = memory, {*layers}
        self.pairs: dict[tuple[nn.Module, torch.dtype], Pair] = {}
        self._thread = threading.get_ident()

    def is_of_this_thread(self) -> bool:
        """Tell whether the calling thread generates."""
        return self._thread == threading.get_ident()

    def add_to(self, result: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Return `result + up (down x)`."""
        down, up = self._pair(layer, x.dtype)
        xa = nn.functional.linear(x, down).flatten(0, -2)
        return torch.addmm(result.flatten(0, -2), xa.to(result.dtype), up.to(result.dtype).t()).view(result.shape)

    def renew(self) -> None:
        """Write also the pairs that prompts did not ask for: a step's inputs may be of another dtype than theirs."""
        for layer, dtype, _ in list(self.memory):
            if layer in self.layers:
                self._pair(layer, dtype)

    def addresses(self) -> list[int]:
        """Return where the pairs are that were asked for."""
        return [tensor.data_ptr() for pair in self.pairs.values() for tensor in pair]

    def _pair(self, layer: nn.Module, dtype: torch.dtype) -> Pair:
        if (layer, dtype) not in self.pairs:
            made = [_pair_of(adapter, dtype) for adapter in active_adapters(layer)]
            # new tensors, also of one pair, which may be the parameters themselves
            down, up = torch.cat([pair[0] for pair in made]), torch.cat([pair[1] for pair in made], 1)
            key = layer, dtype, len(down)
            kept = self.memory.setdefault(key, (down, up))
            self.pairs[layer, dtype] = kept[0].copy_(down), kept[1].copy_(up)
        return self.pairs[layer, dtype]


def _pair_of(adapter: Adapter, dtype: torch.dtype) -> Pair:
    if isinstance(adapter.linear, AdapterLinear):
        return adapter.linear.pair(adapter.name, dtype)
    factors = upcast(adapter.factors())
    return factors["down"].to(dtype), (factors["up"] * adapter.scaling).to(dtype)


class PairedLora:
    """PEFT's linear with plain LoRA while a thread generates, for which it is `base_layer(x) + up (down x)`."""

    active_pairs: ActivePairs | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the layer's own class would, in that thread by its pair."""
        layer: Any = self
        pairs = self.active_pairs
        # arguments: PEFT's adapters by sample, among others
        if args or kwargs or pairs is None or not pairs.is_of_this_thread() or layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return pairs.add_to(layer.base_layer(x), x, layer)


@functools.cache
def _paired(kind: type) -> type:
    """Return the subclass of a layer's class."""
    return type(f"Paired{kind.__name__}", (PairedLora, kind), {"__module__": __name__})


@contextmanager
def active_pairs(model: nn.Module, memory: PairMemory) -> Iterator[ActivePairs]:
    """Have the active adapters of low-rank methods of this library, and plain LoRA, applied by an `ActivePairs`."""
    modules = list(model.modules())
    ours: list[Any] = [layer for layer in modules if isinstance(layer, AdapterLinear) and _has_pairs(layer)]
    copies = {inner for wrapper in modules if isinstance(wrapper, ModulesToSaveWrapper) for inner in wrapper.modules()}
    plain: list[Any] = [layer for layer in modules if layer not in copies and _is_plain_lora(layer)]
    pairs = ActivePairs(memory, [*ours, *plain])
    own_classes = [(layer, type(layer)) for layer in plain]
    try:
        for layer in ours:
            layer.per_sample = pairs
        for layer, kind in own_classes:
            layer.active_pairs = pairs
            layer.__class__ = _paired(kind)
        yield pairs
    finally:
        for layer in ours:
            layer.per_sample = None
        for layer, kind in own_classes:
            if type(layer) is _paired(kind):  # else `unfuse` gave it another one
                layer.__class__ = kind
            vars(layer).pop("active_pairs", None)


def _has_pairs(layer: AdapterLinear) -> bool:
    return layer.method.is_low_rank() and not layer.merged and bool(active_adapters(layer))


def _is_plain_lora(layer: nn.Module) -> bool:
    """Tell whether a layer is PEFT's linear whose active adapters are LoRA and nothing beside it."""
    if original_class(layer) not in PLAIN_LORA or isinstance(layer, PairedLora):
        return False
    linear: Any = layer
    if "forward" in vars(linear) or linear.merged or in_out_features(linear.get_base_layer()) is None:
        return False  # a forward of its own is a device map's or X-LoRA's
    adapters = active_adapters(linear)
    return bool(adapters) and all(_is_plain(linear, adapter.name) for adapter in adapters)


def _is_plain(linear: Any, name: str) -> bool:
    """Tell whether an adapter of PEFT's linear is `scaling * B A`, by modules that do nothing else."""
    down, up, dropout = linear.lora_A[name], linear.lora_B[name], linear.lora_dropout[name]
    return (
        name not in linear.lora_variant
        and type(down) is type(up) is nn.Linear
        and down.bias is None
        and up.bias is None
        and {down.weight.dtype, up.weight.dtype} <= {*FACTOR_DTYPES}
        and not (dropout.training and getattr(dropout, "p", 0))
        and not any(skipped_reason(name, part) for part in (down, up, dropout))
    )
