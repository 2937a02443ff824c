"""The rows of one batch under different adapters (PEFT's `adapter_names`): which row has which, and their pairs."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsr_scale.errors import UserError

if TYPE_CHECKING:
    from lsr_scale.adapters.peft import AdapterLinear

Pair = tuple[Tensor, Tensor]
# PEFT's name for rows of a batch that use no adapter
BASE_ROW = "__base__"
# modules trained whole that PEFT runs row by row
MIXED_WHOLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def lock_of(model: nn.Module) -> Any:
    """Return the lock of a model whose batches name adapters: not on the model, which is copied and pickled."""
    return _LOCKS.setdefault(model, threading.RLock())


def add_rows(result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return `result + (x_b down_b) up_b` for `x [B, ..., in]`, `down [B, in, R]` and `up [B, R, out]`."""
    # generation does this for every linear and token: what the host does counts
    xa = torch.bmm(x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1]), down)
    flat = result if result.dim() == 3 else result.reshape(len(result), -1, result.shape[-1])
    if xa.dtype != flat.dtype:
        xa, up = xa.to(flat.dtype), up.to(flat.dtype)
    return torch.baddbmm(flat, xa, up).view(result.shape)


class Rows(ABC):
    """The adapters of the rows of one batch, for the thread that computes it."""

    def __init__(self, names: Sequence[str], copies: int = 1) -> None:
        """Keep which row uses which adapter.

        Args:
            names: Of the adapters, one a row.
            copies: How many rows generation may make of one, as beam search does: behind the encoder, if there is one.
        """
        self.distinct = list(dict.fromkeys(names))
        self.index = [self.distinct.index(name) for name in names]
        self.copies, self._thread = copies, threading.get_ident()
        self._pairs: dict[tuple[nn.Module, torch.dtype, int], Pair | None] = {}

    def are_this_threads(self) -> bool:
        """Tell whether the calling thread computes the batch; another one's forward is none of theirs."""
        return self._thread == threading.get_ident()

    def times(self, batch: int) -> int:
        """Return how often each row stands in a batch.

        Raises:
            UserError: if the batch has another number of rows than there are names.
        """
        if batch in (len(self.index), self.copies * len(self.index)):
            return batch // len(self.index)
        raise UserError(f"adapter_names: {len(self.index)} names for a batch of {batch} rows; give one for each row")

    def pair(self, layer: "AdapterLinear", dtype: torch.dtype, batch: int) -> Pair | None:
        """Return `(down^T [B, in, R], scaling * up^T [B, R, out])` of the rows at a linear, None if none adapts it."""
        times = self.times(batch)
        if (layer, dtype, times) not in self._pairs:
            index = [place for place in self.index for _ in range(times)]
            for found, pair in self._find(layer, dtype, index):
                self._pairs[found, dtype, times] = pair
        return self._pairs[layer, dtype, times]

    @abstractmethod
    def _find(
        self, layer: "AdapterLinear", dtype: torch.dtype, index: list[int]
    ) -> "Iterator[tuple[AdapterLinear, Pair | None]]":
        """Yield the pairs of a linear, and of others at choice; `index` is each row's place among `distinct`."""


class NamedRows(Rows):
    """The pairs of a batch's rows, each row under one of the adapters that the model holds."""

    def _find(
        self, layer: "AdapterLinear", dtype: torch.dtype, index: list[int]
    ) -> "Iterator[tuple[AdapterLinear, Pair | None]]":
        """Yield the pairs of one linear; smaller ranks are filled up with zeros."""
        held = [layer.pair(name, dtype) if name in layer.adapter_configs else None for name in self.distinct]
        like = next((pair[0] for pair in held if pair), None)
        if like is None:
            yield layer, None
            return
        rank = max(pair[0].shape[0] for pair in held if pair)
        downs = like.new_zeros(len(held), rank, layer.in_features)
        ups = like.new_zeros(len(held), layer.out_features, rank)
        for place, pair in enumerate(held):
            if pair:
                downs[place, : len(pair[0])], ups[place, :, : len(pair[0])] = pair
        yield layer, (downs[index].transpose(1, 2), ups[index].transpose(1, 2))


def whole_by_rows(wrapper: Any, names: Sequence[str], rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a module of `modules_to_save` on a batch: each row through its adapter's copy, or the base's own."""
    if wrapper.disable_adapters or not rows.are_this_threads():
        return type(wrapper).forward(wrapper, x, *args, **kwargs)
    held = [name if name in wrapper.modules_to_save else BASE_ROW for name in names]
    held = [name for name in held for _ in range(rows.times(len(x)))]
    return wrapper._mixed_batch_forward(x, *args, adapter_names=held, **kwargs)
