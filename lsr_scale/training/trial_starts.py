"""Starts from the gradient (`gradient_start`) of a sweep's trials, computed once for all that have the same one."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsr_scale.adapters.pairs import Adapter
from lsr_scale.config import RunConfig

MOST = 8  # kept at a time: trials of the same start follow one another, but where a grid's last key changes the adapter


@dataclass(frozen=True)
class Start:
    """Factors by the adapted module's name and their own, on the CPU, and what was said of them."""

    factors: dict[str, dict[str, Tensor]]
    said: str

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], said: str) -> "Start":
        """Return the factors that adapters have now."""
        return cls({name: _on_cpu(adapter) for name, adapter in adapters.items()}, said)

    @torch.no_grad()
    def give(self, adapters: Mapping[str, Adapter]) -> None:
        """Give adapters of the same key these factors."""
        for module, adapter in adapters.items():
            for name, factor in adapter.factors().items():
                factor.data.copy_(self.factors[module][name])


class TrialStarts:
    """The starts that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Start] = OrderedDict()

    def of(self, key: str) -> Start | None:
        """Return the start of a key, where it is known."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: str, start: Start) -> None:
        """Keep a start."""
        self._kept[key] = start
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)


def start_key(run: RunConfig, adapters: Mapping[str, Adapter], passes: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of all that a start is made of; a sweep's trials agree in how the base computes.

    That is the base, the rows, the adapted modules, the factors as they were drawn, and the seed: rates, optimizers and
    scalings are not in it.

    Args:
        run: The run, of a process by itself.
        adapters: By the adapted module's name, freshly drawn.
        passes: The rows, as the model gets them.
    """
    sha256 = hashlib.sha256(json.dumps([run.model.model_dump(), run.training["seed"]], default=str).encode())
    for module, adapter in adapters.items():
        sha256.update(f"\n{module} {adapter.method.__module__}.{adapter.method.__qualname__}".encode())
        _add(sha256, _on_cpu(adapter))
    for batch in passes:
        _add(sha256, {name: value for name, value in batch.items() if isinstance(value, Tensor)})
    return sha256.hexdigest()


def _on_cpu(adapter: Adapter) -> dict[str, Tensor]:
    return {name: factor.detach().to("cpu", copy=True) for name, factor in adapter.factors().items()}


def _add(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
