"""Which decoder layers keep their activations, and which their dequantized weights, by the memory there is.

A fused layer has a ladder: it computes everything again in the backward pass ("full"), or gate and up ("mlp"), or
nothing ("none"), or nothing and holds its weights dequantized. A rung costs memory and saves time. On a 7B model in 4
bits and an H200 the first two save about 6 ms a step and GiB, whatever the number of tokens; holding weights, whose
cost does not grow with the tokens, 0.9. So all layers take the first rung before one takes the second, and so on.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from lsr_scale.fused.models import FusedLayer, hold
from lsr_scale.model.shard import is_sharded

# rungs: what is computed again, and whether weights are held
_RUNGS = (("full", False), ("mlp", False), ("none", False), ("none", True))
_WORDS = {
    ("full", False): "keep their input alone",
    ("mlp", False): "keep all but gate and up",
    ("none", False): "keep everything",
    ("none", True): "keep everything, and their weights in {dtype}",
}


@dataclass(frozen=True)
class MemoryReport:
    """What `fit_memory` chose.

    Attributes:
        layers: How many layers stand on each rung, as (recompute, weights held).
        extra_bytes: What that takes beyond keeping the layers' inputs alone.
        dtype: Of the held weights.
    """

    layers: dict[tuple[str, bool], int]
    extra_bytes: float
    dtype: str

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"{self.layers[rung]} {_WORDS[rung]}" for rung in reversed(_RUNGS) if rung in self.layers]
        words = "; ".join(parts).format(dtype=self.dtype)
        return f"of {sum(self.layers.values())} decoder layers {words} ({self.extra_bytes / 2**30:.1f} GiB)"


def fit_memory(model: nn.Module, free_bytes: float, tokens: int) -> MemoryReport | None:
    """Let the fused layers of a model keep as much as fits into memory that would else stay free.

    For loops of your own: fuse with `recompute="full"`, take a step, and give this what the GPU has left at the step's
    peak. On several GPUs give all of them the smallest, so that none waits for another.

    Args:
        model: A fused model that has run a training step.
        free_bytes: What may be taken beyond a step with `recompute="full"`.
        tokens: The most tokens, padding included, that one forward pass will have.

    Returns:
        What was chosen; None if no layer runs fused.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, FusedLayer) and layer.sizes]
    if not layers:
        return None
    rungs = [0] * len(layers)
    left = free_bytes
    # what is gathered anew for every pass cannot be held from pass to pass
    for rung in range(1, len(_RUNGS) - is_sharded(model)):
        # from the last layer, whose activations live the shortest
        for index in reversed(range(len(layers))):
            cost = _cost(layers[index], rung, tokens) - _cost(layers[index], rung - 1, tokens)
            if rungs[index] == rung - 1 and cost <= left:
                left -= cost
                rungs[index] = rung
    for layer, rung in zip(layers, rungs, strict=True):
        layer.recompute, held = _RUNGS[rung]
        hold(layer, held)
    dtype = str(layers[0].sizes.dtype).removeprefix("torch.")
    return MemoryReport(dict(Counter(_RUNGS[rung] for rung in rungs)), free_bytes - left, dtype)


def release_weights(model: nn.Module) -> None:
    """Have no fused layer of a model hold its dequantized weights any more."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            hold(layer, False)


def _cost(layer: Any, rung: int, tokens: int) -> float:
    """Return the bytes that a layer takes on a rung."""
    recompute, held = _RUNGS[rung]
    return tokens * layer.sizes.kept[recompute] + (layer.sizes.matrices if held else 0)
