"""Many adapters over one base: a batch whose rows use different ones, loaded when named, evicted when memory is short.

    bank = AdapterBank(model, "adapters/", memory_gib=4)
    model.generate(**inputs, adapter_names=["alice", "bob", "__base__"])

The factors of all adapters of one method and one set of shapes lie in one tensor per factor, `[capacity, modules,
...]`, so a thousand adapters are a few tensors, not half a million parameters. A batch gathers the factors of its
distinct adapters, materializes them at once, and every linear adds two batched products:

    y_b = W x_b + up[a_b] (down[a_b] x_b),        a_b the adapter of row b

exact for any low-rank method, whatever share of the rows each adapter has.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lsr_scale.adapters.base import BASE_ROW, AdapterConfig, AdapterLinear, Pair
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.saved_adapter import CONFIG, WEIGHTS, read_config, read_weights


@dataclass
class _Shelf:
    """The factors of all modules of one set of shapes, each `[capacity, modules, ...]`, and scalings of that size."""

    modules: dict[str, AdapterLinear] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    scalings: Tensor = field(default_factory=lambda: torch.empty(0))


class AdapterBank:
    """Adapters out of the folders of one folder, as many as fit; the least recently used one leaves first."""

    def __init__(
        self, model: PeftModel, folder: str | Path, memory_gib: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """Reserve the memory and answer the model's `adapter_names` from now on.

        Args:
            model: A PEFT model with one adapter of the method and shapes that all of them have; it stays as it is.
            folder: Holds one folder per adapter, named as rows name it, as `save_pretrained` writes them.
            memory_gib: What the factors may take, on the device of the model.
            dtype: What the factors are held in; they are materialized in float32 in any case.

        Raises:
            UserError: if the memory holds no adapter, or the model's adapter has no low-rank form.
        """
        self.folder = user_path(folder)
        self.slots: OrderedDict[str, int] = OrderedDict()
        self.loads = self.evictions = 0
        tuner: Any = model.base_model
        layers = {name: layer for name, layer in tuner.named_modules() if isinstance(layer, AdapterLinear)}
        if not layers:
            raise UserError("AdapterBank: the model has no adapter of this library; inject one of the wanted shapes")
        adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
        self.method = next(iter(layers.values())).method
        if not self.method.is_low_rank():
            raise UserError(f"AdapterBank: {self.method.name} has no low-rank form; rows cannot use different ones")
        shelves: dict[Any, _Shelf] = {}
        self.shelf_of: dict[AdapterLinear, _Shelf] = {}
        for name, layer in layers.items():
            shapes = tuple((key, tuple(factor.shape)) for key, factor in layer.factors(adapter).items())
            shelf = shelves.setdefault(shapes, _Shelf())
            shelf.modules[name] = layer
            self.shelf_of[layer] = shelf
        size = sum(factor.numel() for layer in layers.values() for factor in layer.factors(adapter).values())
        self._numel, self.adapter_bytes = size, size * dtype.itemsize
        self.capacity = int(memory_gib * 2**30) // self.adapter_bytes
        if self.capacity < 1:
            raise UserError(
                f"AdapterBank: memory_gib={memory_gib} holds no adapter; one takes {self.adapter_bytes / 2**30:.3g} GiB"
            )
        device = next(iter(next(iter(layers.values())).factors(adapter).values())).device
        for shapes, shelf in shelves.items():
            size = self.capacity, len(shelf.modules)
            # zeros: rows of the base read a slot too, times a scaling of zero
            shelf.factors = {key: torch.zeros(*size, *shape, dtype=dtype, device=device) for key, shape in shapes}
            shelf.scalings = torch.zeros(size, device=device)
        self._shelves = list(shelves.values())
        tuner.bank = self

    def load(self, name: str) -> int:
        """Read an adapter from its folder unless it is there, and return its slot; another leaves if none is free.

        Raises:
            UserError: if there is no such adapter, or it is damaged or of other shapes. The bank stays as it was.
        """
        if name in self.slots:
            self.slots.move_to_end(name)
            return self.slots[name]
        config, tensors = self._read(name)
        if len(self.slots) < self.capacity:
            slot = min(set(range(self.capacity)) - set(self.slots.values()))
        else:
            _, slot = self.slots.popitem(last=False)
            self.evictions += 1
        for shelf in self._shelves:
            for key, held in shelf.factors.items():
                # one copy to the device for all modules
                held[slot].copy_(torch.stack([tensors[module, key] for module in shelf.modules]))
            scalings = [config.for_module(module.removeprefix("model.")).scaling for module in shelf.modules]
            shelf.scalings[slot].copy_(torch.tensor(scalings))
        self.slots[name] = slot
        self.loads += 1
        return slot

    def evict(self, name: str) -> None:
        """Forget an adapter; its slot is free."""
        self.slots.pop(name, None)

    def rows(self, names: Sequence[str]) -> "BankRows":
        """Return the adapters of the rows of one batch, all in memory."""
        distinct = [name for name in dict.fromkeys(names) if name != BASE_ROW]
        if len(distinct) > self.capacity:
            raise UserError(
                f"adapter_names: {len(distinct)} different adapters in one batch, but the bank's memory holds "
                f"{self.capacity}; raise memory_gib or make the batch smaller"
            )
        for name in distinct:  # first those that are there, so that none of them leaves for another
            if name in self.slots:
                self.slots.move_to_end(name)
        slots = [self.load(name) for name in distinct]
        index = [distinct.index(name) if name != BASE_ROW else len(distinct) for name in names]
        return BankRows(self, slots, index)

    def _read(self, name: str) -> tuple[AdapterConfig, dict[tuple[str, str], Tensor]]:
        """Return an adapter's configuration, and its factors by module and name, checked before one is kept."""
        where = self._folder_of(name)
        config = read_config(where)
        if not isinstance(config, self.method.config_class):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(f"{where}: a {kind} adapter; this bank holds {self.method.name} adapters")
        # whatever it holds takes memory before it can be looked at: float64 factors and a long header at most
        stored = read_weights(where, most_bytes=2 * 8 * self._numel + 2**20)
        tensors: dict[tuple[str, str], Tensor] = {}
        for shelf in self._shelves:
            for module, (key, held) in itertools.product(shelf.modules, shelf.factors.items()):
                name = f"base_model.{module}.{self.method.prefix}{key}"
                tensor = stored.pop(name, None)
                if tensor is None:
                    raise UserError(f"{where}: {name} is missing")
                if tensor.shape != held.shape[2:]:
                    raise UserError(
                        f"{where}: {name} is {list(tensor.shape)}, this bank's adapters have {list(held.shape[2:])}"
                    )
                if not tensor.to(held.dtype).isfinite().all():
                    raise UserError(f"{where}: {name} has values beyond {held.dtype}, which this bank holds")
                tensors[module, key] = tensor
        if stored:
            raise UserError(f"{where}: {len(stored)} tensors that this bank's adapters do not have: {min(stored)}")
        return config, tensors

    def _folder_of(self, name: str) -> Path:
        """Return the folder of an adapter; neither its name nor a link leads out of the bank's."""
        where, home = self.folder / name, self.folder.resolve()
        if "\0" in name or where.resolve().parent != home:
            raise UserError(f"adapter_names: {name!r} is no name of a folder in {self.folder}")
        for file in (where / CONFIG, where / WEIGHTS):
            if not file.is_file():
                raise UserError(f"adapter_names: there is no adapter {name!r} in {self.folder} (no file {file.name})")
            if not file.resolve().is_relative_to(home):
                raise UserError(f"{file}: is a link out of {self.folder}; copy the file there")
        return where


class BankRows:
    """The pairs of a batch's rows, made when a linear first asks, for all linears of its shapes at once."""

    def __init__(self, bank: AdapterBank, slots: list[int], index: list[int]) -> None:
        self.bank, self.slots, self.index = bank, slots, index
        self._pairs: dict[tuple[AdapterLinear, torch.dtype], Pair] = {}

    def pair(self, layer: AdapterLinear, dtype: torch.dtype) -> Pair:
        """Return `(down^T [B, in, R], scaling * up^T [B, R, out])` of the rows at a linear."""
        found = self._pairs.get((layer, dtype))
        if found is None:
            shelf = self.bank.shelf_of[layer]
            pairs = [side.unbind(1) for side in self._materialized(shelf, dtype)]
            for module, down, up in zip(shelf.modules.values(), *pairs, strict=True):
                self._pairs[module, dtype] = down.transpose(1, 2), up.transpose(1, 2)
            found = self._pairs[layer, dtype]
        return found

    def _materialized(self, shelf: _Shelf, dtype: torch.dtype) -> Pair:
        device = shelf.scalings.device
        # the last one is the base's: any slot, scaled by zero
        slots = torch.tensor([*self.slots, 0], device=device)
        scalings = shelf.scalings[slots]
        scalings[-1] = 0
        wide = {key: held[slots] for key, held in shelf.factors.items()}
        wide = {key: held.float() if held.dtype.itemsize < 4 else held for key, held in wide.items()}
        down, up = self.bank.method.materialize(wide)
        up = up * scalings[..., None, None]
        rows = torch.tensor(self.index, device=device)
        return down.to(dtype)[rows], up.to(dtype)[rows]
