"""Many adapters over one base: a batch whose rows use different ones, loaded when named, evicted when memory is short.

    bank = AdapterBank(model, "adapters/", memory_gib=4)
    model.generate(**inputs, adapter_names=["alice", "bob", "__base__"])

The factors of all adapters of one method and one set of shapes lie in one tensor per factor, `[capacity, modules,
...]`, so a thousand adapters are a few tensors, not half a million parameters. A batch gathers the factors of its
distinct adapters, materializes them at once, and every linear adds two batched products:

    y_b = W x_b + up[a_b] (down[a_b] x_b),        a_b the adapter of row b

exact for any low-rank method, whatever share of the rows each adapter has. Threads take turns, a batch at a time.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lsr_scale.adapters.peft import AdapterConfig, AdapterLinear
from lsr_scale.adapters.per_sample import BASE_ROW, Pair, Rows
from lsr_scale.adapters.saved import CONFIG, WEIGHTS, read_config, read_weights
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path


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
            UserError: if the memory holds no adapter or is not there, the model's adapter has no low-rank form, or the
                model has a bank already.
        """
        self.folder = user_path(folder)
        self.slots: OrderedDict[str, int] = OrderedDict()
        self.loads = self.evictions = 0
        if not self.folder.is_dir():
            raise UserError(
                f"AdapterBank: {self.folder}: no such folder; name the one that holds the adapters' folders"
            )
        if not isinstance(memory_gib, int | float) or not 0 < memory_gib < 2**20:
            raise UserError(f"AdapterBank: memory_gib: expected a number of GiB above 0, got {memory_gib!r}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(
                f"AdapterBank: dtype: factors are held in a floating-point one, such as float32, not {dtype}"
            )
        tuner: Any = model.base_model
        layers = {name: layer for name, layer in tuner.named_modules() if isinstance(layer, AdapterLinear)}
        if not layers:
            raise UserError("AdapterBank: the model has no adapter of this library; inject one of the wanted shapes")
        adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
        layers = {name: layer for name, layer in layers.items() if layer.factors(adapter)}
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
        if tuner.bank is not None:
            raise UserError(f"AdapterBank: the model has one already, of {tuner.bank.folder}; close() that one first")
        device = next(iter(next(iter(layers.values())).factors(adapter).values())).device
        try:
            with torch.inference_mode(False):  # adapters are loaded in and out of it
                for shapes, shelf in shelves.items():
                    size = self.capacity, len(shelf.modules)
                    # zeros: rows of the base read a slot too, times a scaling of zero
                    shelf.factors = {
                        key: torch.zeros(*size, *shape, dtype=dtype, device=device) for key, shape in shapes
                    }
                    shelf.scalings = torch.zeros(size, device=device)
        except RuntimeError as error:  # out of memory, the CPU's too
            raise UserError(f"AdapterBank: memory_gib={memory_gib} is more than {device} has; lower it") from error
        self._shelves = list(shelves.values())
        self._tuner = tuner
        tuner.bank = self

    def load(self, name: str) -> int:
        """Read an adapter from its folder unless it is there, and return its slot; another leaves if none is free.

        Raises:
            UserError: if there is no such adapter, or it is damaged or of other shapes. The bank stays as it was.
        """
        with self._tuner.lock:
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
        with self._tuner.lock:
            self.slots.pop(name, None)

    def close(self) -> None:
        """Give the memory back; `adapter_names` means the model's own adapters again, and another bank may come."""
        with self._tuner.lock:
            self._tuner.bank = None
            self.slots.clear()
            self.shelf_of.clear()
            self._shelves.clear()

    def rows(self, names: Sequence[str], copies: int = 1) -> "BankRows":
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
        return BankRows(self, names, {name: self.load(name) for name in distinct}, copies)

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


class BankRows(Rows):
    """The pairs of a batch's rows, made when a linear first asks, for all linears of its shapes at once."""

    def __init__(self, bank: AdapterBank, names: Sequence[str], slots: Mapping[str, int], copies: int) -> None:
        super().__init__(names, copies)
        self.bank = bank
        # the base's: any slot, scaled by zero
        self.slots = [slots.get(name, 0) for name in self.distinct]
        self.scales = [float(name != BASE_ROW) for name in self.distinct]

    def _find(
        self, layer: AdapterLinear, dtype: torch.dtype, index: list[int]
    ) -> Iterator[tuple[AdapterLinear, Pair | None]]:
        shelf = self.bank.shelf_of.get(layer)
        if shelf is None or not any(self.scales):
            yield layer, None
            return
        device = shelf.scalings.device
        slots, scales = torch.tensor(self.slots, device=device), torch.tensor(self.scales, device=device)
        wide = {key: held[slots] for key, held in shelf.factors.items()}
        wide = {key: held.float() if held.dtype.itemsize < 4 else held for key, held in wide.items()}
        down, up = self.bank.method.materialize(wide)
        up = up * (shelf.scalings[slots] * scales[:, None])[..., None, None]
        rows = torch.tensor(index, device=device)
        pairs = [side.to(dtype)[rows].unbind(1) for side in (down, up)]
        for module, one, other in zip(shelf.modules.values(), *pairs, strict=True):
            yield module, (one.transpose(1, 2), other.transpose(1, 2))
