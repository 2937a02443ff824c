"""Which decoder layers save their activations, and which cache their dequantized weights, by the memory there is.

A fused layer has four levels: it recomputes everything in the backward pass ("full"), or gate and up ("mlp"), or
nothing ("none"), or nothing and caches its dequantized weights. Each level costs memory and saves time: on a 7B model
in 4 bits and an H200 the second and third about 6 ms a step per GiB, whatever the number of tokens; the last, whose
cost does not grow with the tokens, 0.9. So all layers reach one level before any goes to the next.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from lsr_scale.fused.modules import FusedLayer
from lsr_scale.fused.patching import set_weight_cache
from lsr_scale.model.shard import is_sharded
from lsr_scale.units import byte_size

# share of a GPU's memory that stays free: for the allocator's fragments, libraries that load late, the driver
MARGIN = 0.08

# what is recomputed, and whether weights are cached
_LEVELS = (("full", False), ("mlp", False), ("none", False), ("none", True))
_WORDS = {
    ("full", False): "recompute everything",
    ("mlp", False): "recompute gate and up",
    ("none", False): "recompute nothing",
    ("none", True): "recompute nothing and cache their weights in {dtype}",
}


@dataclass(frozen=True)
class MemoryReport:
    """What `fit_memory` chose.

    Attributes:
        layers: How many layers have each level, as (recompute, weights cached).
        extra_bytes: What that takes beyond saving only the layers' inputs.
        dtype: Of the cached weights.
    """

    layers: dict[tuple[str, bool], int]
    extra_bytes: float
    dtype: str

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"{self.layers[level]} {_WORDS[level]}" for level in reversed(_LEVELS) if level in self.layers]
        words = "; ".join(parts).format(dtype=self.dtype)
        return f"of {sum(self.layers.values())} decoder layers {words} ({byte_size(self.extra_bytes)})"


def fit_memory(model: nn.Module, free_bytes: float, tokens: int) -> MemoryReport | None:
    """Let the fused layers of a model save and cache as much as fits into memory that would otherwise stay free.

    For training loops of your own: fuse with `recompute="full"`, take a step, and give this what the GPU has left at
    the step's peak. On several GPUs give all of them the smallest, so that none waits for another.

    Args:
        model: A fused model that has run a training step.
        free_bytes: Memory to use beyond a step with `recompute="full"`.
        tokens: The most tokens, padding included, that one forward pass will have.

    Returns:
        What was chosen; None if no layer runs fused.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, FusedLayer) and layer.sizes]
    if not layers:
        return None
    levels = [0] * len(layers)
    free = free_bytes
    # weights that are all-gathered for every pass cannot be cached from pass to pass
    for level in range(1, len(_LEVELS) - is_sharded(model)):
        # from the last layer, whose activations live the shortest
        for index in reversed(range(len(layers))):
            cost = _cost(layers[index], level, tokens) - _cost(layers[index], level - 1, tokens)
            if levels[index] == level - 1 and cost <= free:
                free -= cost
                levels[index] = level
    for layer, level in zip(layers, levels, strict=True):
        layer.recompute, cached = _LEVELS[level]
        set_weight_cache(layer, cached)
    dtype = str(layers[0].sizes.dtype).removeprefix("torch.")
    return MemoryReport(dict(Counter(_LEVELS[level] for level in levels)), free_bytes - free, dtype)


def clear_weight_cache(model: nn.Module) -> None:
    """Free the cached weights of all fused layers of a model, and cache none from here on."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            set_weight_cache(layer, False)


def _cost(layer: Any, level: int, tokens: int) -> float:
    """Return the bytes that a layer takes at a level."""
    recompute, cached = _LEVELS[level]
    return tokens * layer.sizes.saved_per_token[recompute] + (layer.sizes.cached_weights if cached else 0)
