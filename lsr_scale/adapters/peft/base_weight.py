"""Factors that are made of a base layer's own weight: read whole, made once, kept in the cache folder, and recognized.

    <cache>/factors/<digest of the weight, method and rank>.safetensors

They are frozen and not saved with an adapter, whose file stays small: whoever loads it makes them again. So an adapter
carries a sketch of them, and how the weights were held, and is refused on a base that gives others: of another model,
or in another quantization.
"""

import contextlib
import functools
import hashlib
import math
import os
import time
import uuid
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lsr_scale.adapters.peft.method import AdapterMethod, Params
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import dequantize, quantization_of
from lsr_scale.model.builtin import cache_folder
from lsr_scale.model.gather import GatherGroup
from lsr_scale.model.shard import sharded_matrices
from lsr_scale.units import amount

MIN_CACHED = 2**14  # elements of a weight: of a square one with so many the SVD takes 2 ms (one CPU core)
DAYS_UNUSED = 30  # after which a file is removed
# A sketch has so many sums over modules, and the size of a typical one. On SmolLM2-135M in NF4 in place of bfloat16 a
# sum differs by 70 % (Nystrom's start) to 540 % (LoRA-XS) of that size, on a random float32 base in bfloat16 by 3 %.
SKETCH_SIZE = 64
TOLERANCE = 0.05

# factors that are in memory, by digest and name: adapters over one base share them
_IN_MEMORY: "weakref.WeakValueDictionary[tuple[str, str], Tensor]" = weakref.WeakValueDictionary()


@torch.no_grad()
def factors_of_weight(layer: Any, method: type[AdapterMethod], config: Any, dtype: torch.dtype) -> Params:
    """Return `method.weight_factors` of a base layer, on its device; of a sharded one on every process.

    Args:
        layer: A linear layer, quantized or not, sharded or not.
        method: Has frozen factors with these options.
        config: The options for this very module.
        dtype: Of the factors.
    """
    group = GatherGroup(sharded_matrices([layer], recurse=False))
    if group.matrices:
        group.unshard()
    try:
        if not method.cache_frozen:
            return {name: _own(value, dtype) for name, value in method.weight_factors(_weight(layer), config).items()}
        key = f"{_digest(layer)}-{method.name}-{config.rank}-{str(dtype).removeprefix('torch.')}"
        names = list(method.frozen_names)
        # looked up once each: between two looks an ended model's factors may be collected
        made = {name: value for name in names if (value := _IN_MEMORY.get((key, name))) is not None}
        if len(made) == len(names) and all(value.device == layer.weight.device for value in made.values()):
            return made
        is_kept = math.prod(_shape(layer)) >= MIN_CACHED
        made = _cached(key, names, layer.weight.device) if is_kept else None
        if made is None:
            made = {name: _own(value, dtype) for name, value in method.weight_factors(_weight(layer), config).items()}
            if is_kept:
                _write(key, made)
        _IN_MEMORY.update({(key, name): value for name, value in made.items()})
        return made
    finally:
        group.reshard()


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor that shares no memory with the weight."""
    return value.to(dtype, copy=True).contiguous()


def _weight_dtype(layer: Any) -> torch.dtype:
    """Return the dtype in which a weight is read: its own, and float32 of a quantized one whatever computes with it."""
    return layer.weight.dtype if type(layer.weight) is nn.Parameter else torch.float32


def _shape(layer: Any) -> tuple[int, int]:
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def _weight(layer: Any) -> Tensor:
    """Return a layer's weight, `[out, in]`."""
    return layer.weight.T if isinstance(layer, Conv1D) else dequantize(layer, _weight_dtype(layer))


def _digest(layer: Any) -> str:
    """Return a digest of a weight as it is stored: of a 4-bit one its codes and scales, of others the values."""
    state = getattr(layer.weight, "quant_state", None)
    stored: Iterable[Any] = (_weight(layer),) if state is None else (layer.weight.data, *state.as_dict().values())
    sha256 = hashlib.sha256(f"{_shape(layer)} {_weight_dtype(layer)}".encode())
    for part in stored:
        if isinstance(part, Tensor):
            sha256.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha256.update(str(part).encode())
    return sha256.hexdigest()[:32]


def _cached(key: str, names: Sequence[str], device: torch.device) -> Params | None:
    """Return factors from the cache folder; None where they are not in it, or it cannot be read."""
    try:
        file = _folder() / f"{key}.safetensors"
        with safe_open(file, "pt", device=str(device)) as opened:
            factors = {name: opened.get_tensor(name) for name in names}
        os.utime(file)
    except (OSError, SafetensorError, ValueError):
        return None
    return factors


def _write(key: str, factors: Mapping[str, Tensor]) -> None:
    """Put factors into the cache folder; nothing but time is lost where that cannot be."""
    with contextlib.suppress(OSError, SafetensorError):
        folder = _folder()
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder)
        temporary = folder / f".{key}.{uuid.uuid4().hex}"  # nobody else's, on no other node either
        try:
            save_file({name: value.cpu() for name, value in factors.items()}, temporary)
            temporary.replace(folder / f"{key}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "factors"


@functools.cache  # once a process: with thousands of files a look takes longer than a small weight's factors
def _remove_unused(folder: Path) -> None:
    """Remove what has not been used for long."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > DAYS_UNUSED * 86_400:
                file.unlink()


@torch.no_grad()
def sketch(frozen: Mapping[str, Params]) -> list[float] | None:
    """Return sums over the frozen factors of a model, and the size of a typical sum; None if there are none.

    Of a factor F `[m, n]` the sum `c^T F z` goes into one of the sums, which and the random signs c and z by its name.

    Args:
        frozen: By the module's name in the base, and the factor's.
    """
    sums, square = [0.0] * SKETCH_SIZE, 0.0
    for module, factors in frozen.items():
        for name, factor in factors.items():
            if factor.is_meta:
                return None
            number = zlib.crc32(f"{module} {name}".encode())
            generator = torch.Generator().manual_seed(number)
            rows, columns = (
                (2.0 * torch.randint(2, (size,), generator=generator) - 1).to(factor.device, torch.float64)
                for size in factor.shape
            )
            sums[number % SKETCH_SIZE] += float(rows @ (factor.double() @ columns))
            square += float(factor.double().square().sum())
    if not square:
        return None
    return [float(f"{value:.6g}") for value in (*sums, math.sqrt(square / SKETCH_SIZE))]


class BaseMark(NamedTuple):
    """By what the base is recognized of whose weights an adapter's frozen factors are made.

    How the weights are held is compared exactly: int8 rounds so little that a sketch alone need not tell it from none.
    The sketch tells one model from another; in it the dtype and the device of a base may differ.
    """

    sketch: list[float]
    quantization: dict[str, int] | None  # modules by how their weights are held; None: saved before this was noted

    @classmethod
    def of_model(cls, model: nn.Module, adapter_name: str) -> "BaseMark | None":
        """Return that of an injected adapter; None where it has no such factors, or no values yet."""
        frozen = frozen_of(model, adapter_name)
        values = sketch(frozen)
        if values is None:
            return None
        modules = dict(model.named_modules())
        held = Counter(quantization_of(cast(Any, modules[name]).get_base_layer()) for name in frozen)
        return cls(values, dict(sorted(held.items())))

    @classmethod
    def of_config(cls, config: Any) -> "BaseMark | None":
        """Return that which a configuration holds, if it holds one."""
        values = getattr(config, "base_sketch", None)
        return None if values is None else cls(values, config.base_quantization)


def check_own_factors(stored: Any, now: Any, where: str) -> None:
    """Raise UserError where the frozen factors of two adapters are not the same, by their configurations."""
    marks = BaseMark.of_config(stored), BaseMark.of_config(now)
    if marks[0] is not None and marks[1] is not None:
        check_mark(marks[0], marks[1], where)
    elif marks != (None, None):
        raise UserError(f"{where}: of two adapters one is made of the base's weights (its init, train) and one is not")


def check_mark(stored: BaseMark, now: BaseMark, where: str) -> None:
    """Raise UserError where factors that were made of two bases' weights are not the same.

    Args:
        stored: What an adapter was saved with.
        now: That of the base, or of the adapter, that it is to be used with.
        where: What is loaded, for the message.
    """
    found = None
    if stored.quantization is not None and now.quantization is not None and stored.quantization != now.quantization:
        found = f"which were held {_as_held(stored.quantization)}, and this base's are {_as_held(now.quantization)}"
    elif (difference := _difference(stored.sketch, now.sketch)) > TOLERANCE:
        found = (
            f"and this base gives other ones (sketches differ by {100 * difference:.3g} %, rounding by less than "
            f"{100 * TOLERANCE:g} %)"
        )
    if found:
        raise UserError(
            f"{where}: its frozen factors are made of its base's weights, {found}; load it on the base that it was "
            "trained on, quantized as then"
        )


def _difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Return the largest difference of two sketches' sums over the size of a typical sum; inf if it is no number."""
    size = max(abs(one[-1]), abs(two[-1]))
    if len(one) != len(two) or not size:
        return math.inf
    difference = max(abs(a - b) for a, b in zip(one, two, strict=True)) / size
    return difference if math.isfinite(difference) else math.inf


def _as_held(quantization: Mapping[str, int]) -> str:
    """Say how weights are held: "in nf4"; where not alike "in nf4 (12 layers) and unquantized (1 layer)"."""
    words = {kind: "unquantized" if kind == "none" else f"in {kind}" for kind in quantization}
    if len(words) == 1:
        return next(iter(words.values()))
    return " and ".join(f"{words[kind]} ({amount(number, 'layer')})" for kind, number in quantization.items())


def frozen_of(model: nn.Module, adapter_name: str) -> dict[str, Params]:
    """Return the frozen factors of an adapter, by the module's name and the factor's."""
    found: dict[str, Params] = {}
    for name, module in model.named_modules():
        layer: Any = module
        frozen = layer.frozen_factors(adapter_name) if hasattr(layer, "frozen_factors") else {}
        if frozen:
            found[name] = frozen
    return found
