"""A batch whose samples use different adapters (PEFT's `adapter_names`): their pairs, gathered and applied.

    y_b = W x_b + scaling * up[a_b] (down[a_b] x_b),        a_b the adapter of sample b

as two batched products a linear. The adapters are those injected into the model (`ModelAdapters`) or those of an
`AdapterBank` (`adapters/bank.py`).
"""

import functools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lsr_scale.adapters.peft.layer import AdapterLinear
from lsr_scale.adapters.peft.method import AdapterMethod, Pair
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.kernels.row_pairs import add_row_pairs_
from lsr_scale.units import amount

# PEFT's name for samples that use no adapter
BASE_MODEL = "__base__"
# the modules of modules_to_save that PEFT runs with a copy for each sample
MIXED_BATCH_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# pairs in memory that stays where it is, by what they are of
PairMemory = dict[Any, Pair]
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def batch_lock(tuner: nn.Module) -> Any:
    """Return the lock that a batch with `adapter_names` holds, and whoever changes a bank's slots.

    It is not on the model, which is copied and pickled.
    """
    return _LOCKS.setdefault(tuner, threading.RLock())


class PerSampleAdapters(ABC):
    """The adapters of the samples of one batch, for the thread that runs it."""

    def __init__(self, adapter_names: Sequence[str], expand_size: int = 1, memory: PairMemory | None = None) -> None:
        """Note which sample uses which adapter.

        Args:
            adapter_names: One a sample.
            expand_size: By how much generation may expand the batch, as beam search does: each sample is repeated so
                often in a row (behind the encoder, if there is one).
            memory: Keeps the pairs, which are written where those of the batch before were, for a CUDA graph that reads
                them there.
        """
        self.unique_names = list(dict.fromkeys(adapter_names))
        self.index = [self.unique_names.index(name) for name in adapter_names]
        self.expand_size, self._thread = expand_size, threading.get_ident()
        self.memory = memory
        self._pairs: dict[tuple[nn.Module, torch.dtype, int], Pair | None] = {}

    def is_of_this_thread(self) -> bool:
        """Tell whether the calling thread runs the batch; a forward pass of another one is not concerned."""
        return self._thread == threading.get_ident()

    def addresses(self) -> list[int]:
        """Return where the pairs are that were asked for so far; a layer that no sample's adapter has has none."""
        return [side.data_ptr() for pair in self._pairs.values() if pair is not None for side in pair]

    def renew(self) -> None:
        """Write also the pairs in memory that were not asked for yet: those that a graph reads may be among them."""
        for layer, dtype, batch_size, _ in list(self.memory or ()):
            self.pair(layer, dtype, batch_size)

    def repeats(self, batch_size: int) -> int:
        """Return how often each sample is repeated in a batch.

        Raises:
            UserError: if the batch has another number of samples than there are names.
        """
        if batch_size in (len(self.index), self.expand_size * len(self.index)):
            return batch_size // len(self.index)
        raise UserError(
            f"adapter_names: {amount(len(self.index), 'name')} for a batch of {amount(batch_size, 'sample')}; give one "
            "for each sample"
        )

    def add_to(self, result: Tensor, x: Tensor, layer: AdapterLinear) -> Tensor:
        """Return `result [B, ..., out]` plus the update of each sample of `x [B, ..., in]` at a layer."""
        pair = self.pair(layer, x.dtype, len(x))
        if pair is None:
            return result
        if torch.is_grad_enabled() or layer.base_layer._forward_hooks:  # hooks may have kept the result
            return add_batched(result, x, *pair)
        if self.memory is not None and result.dim() == 3 and result.shape[1] == 1:
            add_row_pairs_(result[:, 0], x[:, 0], pair[0].mT, pair[1].mT)
            return result
        return add_batched(result, x, *pair, in_place=True)

    def pair(self, layer: AdapterLinear, dtype: torch.dtype, batch_size: int) -> Pair | None:
        """Return `(down^T [B, in, R], scaling * up^T [B, R, out])` of the samples, None if none adapts it."""
        repeats = self.repeats(batch_size)
        if (layer, dtype, repeats) not in self._pairs:
            index = [place for place in self.index for _ in range(repeats)]
            for made_for, pair in self._gather(layer, dtype, index):
                self._pairs[made_for, dtype, repeats] = pair
        return self._pairs[layer, dtype, repeats]

    @abstractmethod
    def _gather(
        self, layer: AdapterLinear, dtype: torch.dtype, index: list[int]
    ) -> Iterator[tuple[AdapterLinear, Pair | None]]:
        """Yield the pairs of a layer, and of others at choice; `index` is each sample's place in `unique_names`."""


class ModelAdapters(PerSampleAdapters):
    """The samples of a batch, each under one of the adapters that are injected into the model."""

    def _gather(
        self, layer: AdapterLinear, dtype: torch.dtype, index: list[int]
    ) -> Iterator[tuple[AdapterLinear, Pair | None]]:
        """Yield the pairs of one layer; smaller ranks are padded with zeros."""
        pairs = [layer.pair(name, dtype) if name in layer.adapter_configs else None for name in self.unique_names]
        like = next((pair[0] for pair in pairs if pair), None)
        if like is None:
            yield layer, None
            return
        rank = max(pair[0].shape[0] for pair in pairs if pair)
        downs = like.new_zeros(len(pairs), rank, layer.in_features)
        ups = like.new_zeros(len(pairs), layer.out_features, rank)
        for place, pair in enumerate(pairs):
            if pair:
                downs[place, : len(pair[0])], ups[place, :, : len(pair[0])] = pair
        key = layer, dtype, len(index), rank
        made = downs[index], ups[index]
        if self.memory is not None:
            made = tuple(map(Tensor.copy_, self.memory.setdefault(key, made), made))
        yield layer, (made[0].transpose(1, 2), made[1].transpose(1, 2))


def add_batched(result: Tensor, x: Tensor, down: Tensor, up: Tensor, in_place: bool = False) -> Tensor:
    """Return `result + (x_b down_b) up_b` for `x [B, ..., in]`, `down [B, in, R]` and `up [B, R, out]`.

    In place spares a copy of the result, and is for where no gradient is asked for.
    """
    # generation does this for every linear and token: the host's overhead counts
    xa = torch.bmm(x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1]), down)
    flat = result if result.dim() == 3 else result.reshape(len(result), -1, result.shape[-1])
    if not xa.dtype == up.dtype == flat.dtype:  # autocast casts for `bmm`, but for nothing in place
        xa, up = xa.to(flat.dtype), up.to(flat.dtype)
    return (flat.baddbmm_(xa, up) if in_place else torch.baddbmm(flat, xa, up)).view(result.shape)


@contextmanager
def adapters_per_sample(
    tuner: BaseTuner,
    method: type[AdapterMethod],
    bank: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    memory: PairMemory | None = None,
) -> Iterator[PerSampleAdapters]:
    """Have each sample of a batch use its adapter, for one forward pass or generation.

    One batch at a time: a second thread waits, since layers and a bank's slots are the model's.

    Args:
        tuner: PEFT's tuner model.
        method: That of its adapters.
        bank: The `AdapterBank` that the names are looked up in, if any.
        args: Arguments of the call.
        kwargs: Its keyword arguments, `adapter_names` among them.
        memory: Where pairs are kept for a CUDA graph.

    Raises:
        UserError: where samples of one batch cannot use different adapters, or names and batch do not fit.
    """
    adapter_names: Any = kwargs["adapter_names"]
    modules = list(tuner.modules())
    layers = [module for module in modules if isinstance(module, AdapterLinear)]
    wrappers: list[Any] = [module for module in modules if isinstance(module, ModulesToSaveWrapper)]
    with batch_lock(tuner):
        _check(tuner, method, bank, adapter_names, layers, wrappers)
        for batch in (*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds"))):
            if isinstance(batch, Tensor) and len(batch) != len(adapter_names):
                names, samples = amount(len(adapter_names), "name"), amount(len(batch), "sample")
                raise UserError(f"adapter_names: {names} for a batch of {samples}; give one for each sample")
        expand_size = _expand_size(tuner.model, kwargs)
        per_sample: PerSampleAdapters = (
            ModelAdapters(adapter_names, expand_size, memory)
            if bank is None
            else bank.per_sample(adapter_names, expand_size, memory)
        )
        try:
            for layer in layers:
                layer.per_sample = per_sample
            for wrapper in wrappers:
                wrapper.forward = functools.partial(_forward_modules_to_save, wrapper, adapter_names, per_sample)
            yield per_sample
        finally:
            for layer in layers:
                layer.per_sample = None
            for wrapper in wrappers:
                vars(wrapper).pop("forward", None)


def _forward_modules_to_save(
    wrapper: Any, adapter_names: Sequence[str], per_sample: PerSampleAdapters, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return a module of `modules_to_save` on a batch: each sample through its adapter's copy, or the base's own."""
    if wrapper.disable_adapters or not per_sample.is_of_this_thread():
        return type(wrapper).forward(wrapper, x, *args, **kwargs)
    copies = [name if name in wrapper.modules_to_save else BASE_MODEL for name in adapter_names]
    copies = [name for name in copies for _ in range(per_sample.repeats(len(x)))]
    return wrapper._mixed_batch_forward(x, *args, adapter_names=copies, **kwargs)


def _expand_size(model: nn.Module, options: Mapping[str, Any]) -> int:
    """Return by how much generation expands the batch, by its options or the model's: beams, or several answers."""
    default = options.get("generation_config") or getattr(model, "generation_config", None)
    counts = ("num_beams", "num_return_sequences")
    return max(int(options.get(name) or getattr(default, name, None) or 1) for name in counts)


def _check(
    tuner: BaseTuner,
    method: type[AdapterMethod],
    bank: Any,
    adapter_names: Any,
    layers: Sequence[AdapterLinear],
    wrappers: Sequence[ModulesToSaveWrapper],
) -> None:
    """Raise UserError where samples of one batch cannot use different adapters."""
    is_list = isinstance(adapter_names, list | tuple) and all(isinstance(name, str) for name in adapter_names)
    if not is_list or not adapter_names:
        raise UserError(
            f"adapter_names: expected a list with the name of an adapter for each sample, got {adapter_names!r}"[:200]
        )
    if tuner.training:
        raise UserError("adapter_names: for evaluation only; call model.eval() first")
    if not method.is_low_rank():
        raise UserError(
            f"adapter_names: {method.name} has no low-rank form; call the model once per adapter (set_adapter)"
        )
    if any(layer.merged for layer in layers):
        raise UserError("adapter_names: an adapter is merged into the base; call unmerge_adapter() first")
    if bank is not None and wrappers:
        raise UserError("adapter_names: the model has modules_to_save, which an AdapterBank does not load")
    for wrapper in wrappers:
        if not isinstance(wrapper.original_module, MIXED_BATCH_MODULES):
            kind, kinds = type(wrapper.original_module).__name__, ", ".join(k.__name__ for k in MIXED_BATCH_MODULES)
            raise UserError(
                f"adapter_names: modules_to_save has a {kind}, but samples can differ in {kinds} only; call the model "
                "once per adapter (set_adapter)"
            )
    known = {BASE_MODEL, *(name for layer in layers for name in layer.adapter_configs)}
    unknown = sorted({*adapter_names} - known) if bank is None else []
    if unknown:
        raise UserError(f"adapter_names: no adapter {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
