"""Many adapters over one base: a batch whose samples use different ones, loaded on first use, evicted by LRU.

    bank = AdapterBank(model, "adapters/", memory_gib=4)
    model.generate(**inputs, adapter_names=["alice", "bob", "__base__"])

The factors of all adapters of one method and one set of shapes are stacked in one tensor per factor, `[capacity,
modules, ...]`, so a thousand adapters are a few tensors, not half a million parameters. A batch gathers the factors of
its adapters, materializes them at once, and every linear adds two batched products (`peft/per_sample.py`): exact for
any low-rank method, whatever share of the samples each adapter has. Threads take turns, a batch at a time.
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

from lsr_scale.adapters.peft import AdapterConfig, AdapterLinear, Pair, check_own_factors
from lsr_scale.adapters.peft.per_sample import BASE_MODEL, PairMemory, PerSampleAdapters, batch_lock
from lsr_scale.adapters.read import CONFIG_NAME, WEIGHTS_NAME, read_config, read_weights
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.units import amount


@dataclass
class FactorStack:
    """The factors of all modules of one set of shapes, each `[capacity, modules, ...]`, and their scalings."""

    modules: dict[str, AdapterLinear] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()  # of the factors: all adapters have the same, `[modules, ...]` repeated in a view
    scalings: Tensor = field(default_factory=lambda: torch.empty(0))  # [capacity, modules]

    def trained(self) -> dict[str, Tensor]:
        """Return the factors that adapters' files have."""
        return {key: stacked for key, stacked in self.factors.items() if key not in self.frozen}


class AdapterBank:
    """Adapters from the folders in one folder, as many as fit; the least recently used one is evicted first."""

    def __init__(
        self, model: PeftModel, folder: str | Path, memory_gib: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """Allocate the memory; the model's `adapter_names` are looked up in this bank from now on.

        Args:
            model: A PEFT model with one adapter of the method and shapes that all of them have; it stays as it is.
            folder: Has a folder per adapter, as `save_pretrained` writes it, whose name is the adapter's.
            memory_gib: For the factors, on the device of the model.
            dtype: Of the factors in memory; they are materialized in float32 in any case.

        Raises:
            UserError: if the memory is too little for one adapter or not there, the model's adapter has no low-rank
                form, or the model has a bank already.
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
                f"AdapterBank: dtype: expected a floating-point one for factors, such as float32, got {dtype}"
            )
        tuner: Any = model.base_model
        layers = {name: layer for name, layer in tuner.named_modules() if isinstance(layer, AdapterLinear)}
        if not layers:
            raise UserError("AdapterBank: the model has no adapter of this library; inject one of the adapters' shapes")
        adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
        layers = {name: layer for name, layer in layers.items() if layer.factors(adapter)}
        self.method = next(iter(layers.values())).method
        if not self.method.is_low_rank():
            raise UserError(f"AdapterBank: {self.method.name} has no low-rank form; samples cannot use different ones")
        stacks: dict[Any, FactorStack] = {}
        self.stack_of: dict[AdapterLinear, FactorStack] = {}
        for name, layer in layers.items():
            shapes = tuple((key, tuple(factor.shape)) for key, factor in layer.factors(adapter).items())
            stack = stacks.setdefault(shapes, FactorStack())
            stack.modules[name] = layer
            self.stack_of[layer] = stack
        self._config = tuner.peft_config[adapter]
        frozen = {layer: layer.frozen_factors(adapter) for layer in layers.values()}
        size = sum(
            factor.numel()
            for layer in layers.values()
            for key, factor in layer.factors(adapter).items()
            if key not in frozen[layer]
        )
        self._numel, self.adapter_bytes = size, size * dtype.itemsize
        self.capacity = int(memory_gib * 2**30) // self.adapter_bytes
        if self.capacity < 1:
            raise UserError(
                f"AdapterBank: memory_gib={memory_gib} is too little for one adapter; raise it to at least "
                f"{self.adapter_bytes / 2**30 * 1.005:.3g}"
            )
        if tuner.bank is not None:
            raise UserError(f"AdapterBank: the model has one already, of {tuner.bank.folder}; close() that one first")
        device = next(iter(next(iter(layers.values())).factors(adapter).values())).device
        try:
            with torch.inference_mode(False):  # adapters are loaded in and out of it
                for shapes, stack in stacks.items():
                    size = self.capacity, len(stack.modules)
                    # zeros: samples without an adapter read a slot too
                    stack.factors = {
                        key: torch.zeros(*size, *shape, dtype=dtype, device=device)
                        for key, shape in shapes
                        if key not in self.method.frozen_names
                    }
                    stack.scalings = torch.zeros(size, device=device)
                    of_modules = [frozen[layer] for layer in stack.modules.values()]
                    stack.frozen = tuple(of_modules[0])
                    for key in stack.frozen:
                        shared = torch.stack([factors[key] for factors in of_modules])
                        stack.factors[key] = shared.expand(self.capacity, *shared.shape)
        except RuntimeError as error:  # out of memory, the CPU's too
            raise UserError(f"AdapterBank: memory_gib={memory_gib} is more than {device} has; lower it") from error
        self._stacks = list(stacks.values())
        self._tuner = tuner
        tuner.bank = self

    def load(self, name: str) -> int:
        """Load an adapter from its folder unless it is loaded, and return its slot; another is evicted if none is free.

        Raises:
            UserError: if there is no such adapter, or it is damaged or of other shapes. The bank stays as it was.
        """
        with batch_lock(self._tuner):
            if name in self.slots:
                self.slots.move_to_end(name)
                return self.slots[name]
            config, tensors = self._read(name)
            if len(self.slots) < self.capacity:
                slot = min(set(range(self.capacity)) - set(self.slots.values()))
            else:
                _, slot = self.slots.popitem(last=False)
                self.evictions += 1
            for stack in self._stacks:
                for key, stacked in stack.trained().items():
                    # one copy to the device for all modules
                    stacked[slot].copy_(torch.stack([tensors[module, key] for module in stack.modules]))
                scalings = [config.for_module(module.removeprefix("model.")).scaling for module in stack.modules]
                stack.scalings[slot].copy_(torch.tensor(scalings))
            self.slots[name] = slot
            self.loads += 1
            return slot

    def evict(self, name: str) -> None:
        """Free the slot of an adapter, if it is loaded."""
        with batch_lock(self._tuner):
            self.slots.pop(name, None)

    def close(self) -> None:
        """Free the memory; `adapter_names` are those of the model's own adapters again, and it may get another bank."""
        with batch_lock(self._tuner):
            self._tuner.bank = None
            self.slots.clear()
            self.stack_of.clear()
            self._stacks.clear()

    def per_sample(
        self, adapter_names: Sequence[str], expand_size: int = 1, memory: PairMemory | None = None
    ) -> "BankAdapters":
        """Return the adapters of the samples of one batch, all loaded.

        Raises:
            UserError: if they do not fit into the bank, or one cannot be loaded.
        """
        unique_names = [name for name in dict.fromkeys(adapter_names) if name != BASE_MODEL]
        if len(unique_names) > self.capacity:
            raise UserError(
                f"adapter_names: {len(unique_names)} different adapters in one batch, but the bank has memory for "
                f"{self.capacity}; raise memory_gib or make the batch smaller"
            )
        for name in unique_names:  # first those that are loaded, so that none of them is evicted for another
            if name in self.slots:
                self.slots.move_to_end(name)
        slots = {name: self.load(name) for name in unique_names}
        return BankAdapters(self, adapter_names, slots, expand_size, memory)

    def _read(self, name: str) -> tuple[AdapterConfig, dict[tuple[str, str], Tensor]]:
        """Return an adapter's configuration, and its factors by module and name, all of them checked."""
        folder = self._folder_of(name)
        config = read_config(folder)
        if not isinstance(config, self.method.config_class):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(f"{folder}: a {kind} adapter; this bank is for {self.method.name} adapters")
        check_own_factors(config, self._config, str(folder))
        # a file is read into memory before its tensors can be checked: float64 factors and a long header at most
        stored = read_weights(folder, max_bytes=2 * 8 * self._numel + 2**20)
        tensors: dict[tuple[str, str], Tensor] = {}
        for stack in self._stacks:
            for module, (key, stacked) in itertools.product(stack.modules, stack.trained().items()):
                name = f"base_model.{module}.{self.method.prefix}{key}"
                tensor = stored.pop(name, None)
                if tensor is None:
                    raise UserError(f"{folder}: {name} is missing")
                if tensor.shape != stacked.shape[2:]:
                    raise UserError(
                        f"{folder}: {name} is {list(tensor.shape)}, this bank's adapters have {list(stacked.shape[2:])}"
                    )
                if not tensor.to(stacked.dtype).isfinite().all():
                    raise UserError(f"{folder}: {name} has values beyond {stacked.dtype}, the dtype of this bank")
                tensors[module, key] = tensor
        if stored:
            raise UserError(
                f"{folder}: {amount(len(stored), 'tensor')} that this bank's adapters do not have: {min(stored)}"
            )
        return config, tensors

    def _folder_of(self, name: str) -> Path:
        """Return the folder of an adapter; neither its name nor a link leads out of the bank's."""
        folder, root = self.folder / name, self.folder.resolve()
        # "a/" and "a/../a" would be other names of "a", each with a slot
        if "\0" in name or Path(name).name != name or folder.resolve().parent != root:
            raise UserError(f"adapter_names: {name!r} is no name of a folder in {self.folder}")
        for file in (folder / CONFIG_NAME, folder / WEIGHTS_NAME):
            if not file.is_file():
                raise UserError(f"adapter_names: there is no adapter {name!r} in {self.folder} (no file {file.name})")
            if not file.resolve().is_relative_to(root):
                raise UserError(f"{file}: is a link out of {self.folder}; copy the file there")
        return folder


class BankAdapters(PerSampleAdapters):
    """The samples of a batch under adapters of a bank: pairs are made for all linears of a `FactorStack` at once."""

    def __init__(
        self,
        bank: AdapterBank,
        adapter_names: Sequence[str],
        slots: Mapping[str, int],
        expand_size: int,
        memory: PairMemory | None = None,
    ) -> None:
        super().__init__(adapter_names, expand_size, memory)
        self.bank = bank
        # of the base: any slot, then zeros
        self.slots = [slots.get(name, 0) for name in self.unique_names]
        self.is_base = [name == BASE_MODEL for name in self.unique_names]

    def _gather(
        self, layer: AdapterLinear, dtype: torch.dtype, index: list[int]
    ) -> Iterator[tuple[AdapterLinear, Pair | None]]:
        stack = self.bank.stack_of.get(layer)
        if stack is None or (all(self.is_base) and self.memory is None):
            yield layer, None
            return
        device = stack.scalings.device
        slots, samples = torch.tensor(self.slots, device=device), torch.tensor(index, device=device)
        shapes = tuple((name, tuple(stacked.shape)) for name, stacked in stack.factors.items())
        key = layer, dtype, len(index), shapes
        kept = None if self.memory is None else self.memory.get(key)
        pair = self.bank.method.materialize_rows(stack.factors, slots, stack.scalings[slots], samples, dtype, kept)
        if self.memory is not None:
            self.memory[key] = pair
        if any(self.is_base):  # zeros, rather than zero times another adapter's values, which may be beyond the dtype
            bases = torch.tensor([row for row, place in enumerate(index) if self.is_base[place]], device=device)
            pair = pair[0].index_fill_(0, bases, 0), pair[1].index_fill_(0, bases, 0)
        downs, ups = (side.unbind(1) for side in pair)
        for module, down, up in zip(stack.modules.values(), downs, ups, strict=True):
            yield module, (down.transpose(1, 2), up.transpose(1, 2))
