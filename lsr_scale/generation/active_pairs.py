"""A model's active adapters as pairs in memory that stays where it is: what a CUDA graph reads.

In evaluation a layer keeps its pair until a factor changes, and then makes another one elsewhere, where a graph that
was captured before would not look. Here the new values are written where the old ones were.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lsr_scale.adapters.peft import AdapterLinear, Pair
from lsr_scale.adapters.peft.per_sample import PairMemory


class ActivePairs:
    """The pairs of each layer's active adapters, the same for all rows, for the thread that generates."""

    def __init__(self, memory: PairMemory) -> None:
        """Take the memory, which the pairs of the generation before may be in."""
        self.memory = memory
        self.pairs: dict[tuple[nn.Module, torch.dtype], Pair] = {}
        self._thread = threading.get_ident()

    def is_of_this_thread(self) -> bool:
        """Tell whether the calling thread generates."""
        return self._thread == threading.get_ident()

    def add_to(self, result: Tensor, x: Tensor, layer: AdapterLinear) -> Tensor:
        """Return `result + up (down x)`."""
        down, up = self._pair(layer, x.dtype)
        xa = nn.functional.linear(x, down).flatten(0, -2)
        return torch.addmm(result.flatten(0, -2), xa.to(result.dtype), up.to(result.dtype).t()).view(result.shape)

    def addresses(self) -> list[int | None]:
        """Return where the pairs are that were asked for."""
        return [tensor.data_ptr() for pair in self.pairs.values() for tensor in pair]

    def _pair(self, layer: AdapterLinear, dtype: torch.dtype) -> Pair:
        if (layer, dtype) not in self.pairs:
            made = [layer.pair(name, dtype) for name in layer.active_adapters if name in layer.adapter_configs]
            down, up = torch.cat([pair[0] for pair in made]), torch.cat([pair[1] for pair in made], 1)
            key = layer, dtype, len(down)
            kept = self.memory.setdefault(key, (down, up))
            self.pairs[layer, dtype] = kept[0].copy_(down), kept[1].copy_(up)
        return self.pairs[layer, dtype]


@contextmanager
def active_pairs(model: nn.Module, memory: PairMemory) -> Iterator[ActivePairs]:
    """Have the active adapters of low-rank methods of this library applied by an `ActivePairs`."""
    pairs = ActivePairs(memory)
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, AdapterLinear)
        and layer.method.is_low_rank()
        and not (layer.disable_adapters or layer.merged)
        and any(name in layer.adapter_configs for name in layer.active_adapters)
    ]
    try:
        for layer in layers:
            layer.per_sample = pairs
        yield pairs
    finally:
        for layer in layers:
            layer.per_sample = None
