"""Standard LoRA out of exact pairs: truncated without a full SVD, concatenated without any, written as PEFT does."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lsr_scale.adapters import PEFT_METHODS
from lsr_scale.adapters.low_rank import lora_config, truncate
from lsr_scale.adapters.packing import checked_cast, pack
from lsr_scale.errors import UserError
from lsr_scale.exporting.source import WRAPPER, AdapterSource
from lsr_scale.version import __version__

Pair = tuple[Tensor, Tensor]
Pairs = dict[str, Pair]


def truncated(pairs: Pairs, rank: int | None) -> tuple[Pairs, dict[str, float]]:
    """Return pairs of at most `rank`, and the relative error of every module that was truncated."""
    truncated_pairs: Pairs = {}
    errors: dict[str, float] = {}
    for name, (down, up) in pairs.items():
        if rank is None or rank >= down.shape[0]:
            truncated_pairs[name] = down, up
        else:
            down, up, errors[name] = truncate(down, up, rank)
            truncated_pairs[name] = down, up
    return truncated_pairs, errors


def concatenate(sources: Sequence[AdapterSource], weights: Sequence[float]) -> Pairs:
    """Return the pairs of `sum_i weights[i] * update_i`, exactly: ranks add.

    Raises:
        UserError: if the adapters are of layers of different shapes, or have fully trained modules.
    """
    total: Pairs = {}
    for source, weight in zip(sources, weights, strict=True):
        if source.extra:
            raise UserError(f"{source.folder}: has fully trained modules ({sorted(source.extra)[0]}), which do not add")
        for module in source.modules:
            down, up = source.pair(module)
            if module in total:
                old_down, old_up = total[module]
                if old_down.shape[1] != down.shape[1] or old_up.shape[0] != up.shape[0]:
                    raise UserError(
                        f"{source.folder}: {module} is {[up.shape[0], down.shape[1]]}, in {sources[0].folder} "
                        f"{[old_up.shape[0], old_down.shape[1]]}; merge adapters of one base"
                    )
                down, up = torch.cat([old_down, down]), torch.cat([old_up, weight * up], 1)
            else:
                up = weight * up
            total[module] = down, up
    return total


def write_lora(
    folder: Path,
    pairs: Mapping[str, Pair],
    source: AdapterSource,
    dtype: torch.dtype,
    metadata: dict[str, str],
    targets: dict[str, Any] | None = None,
) -> None:
    """Write a PEFT LoRA adapter whose scaling is 1: it stands in lora_B, so that every reader applies the same.

    Args:
        folder: An existing folder.
        pairs: By module.
        source: Where configuration and fully trained modules come from.
        dtype: Of the factors.
        metadata: Of the safetensors file.
        targets: Which modules; those of the source's own configuration by default.
    """
    names = ["target_modules", "exclude_modules"]
    if not isinstance(source.config.target_modules, str):  # of an expression PEFT takes no layers beside it
        names += ["layers_to_transform", "layers_pattern"]
    config = lora_config(
        {name: down.shape[0] for name, (down, _) in pairs.items()},
        source.config,
        **({name: getattr(source.config, name) for name in names} if targets is None else targets),
    )
    config.save_pretrained(str(folder))
    tensors = dict(source.extra)
    for name, (down, up) in pairs.items():
        for factor, value in (("lora_A", down), ("lora_B", up)):
            tensors[f"{WRAPPER}{name}.{factor}.weight"] = checked_cast(value, dtype, f"{name}.{factor}").contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", **metadata})


def write_factors(folder: Path, source: AdapterSource, bits: int, metadata: dict[str, str]) -> None:
    """Write the factors themselves in 16 (float16), 8 or 4 bits, in PEFT's folder layout.

    Raises:
        UserError: for PEFT's own methods in 8 or 4 bits, whose loading is not this package's.
    """
    if source.method in PEFT_METHODS and bits != 16:
        raise UserError(
            f"--bits: PEFT's own {source.method} loads 16 bits only; --to lora --max-rank makes a smaller adapter"
        )
    config = dataclasses.replace(source.config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    names = {"down": "lora_A.weight", "up": "lora_B.weight"} if source.method == "lora" else {}
    named = {
        module: {names.get(name, source.prefix + name): value for name, value in params.items()}
        for module, params in source.modules.items()
    }
    tensors = {name: value.contiguous() for name, value in source.extra.items()}
    if bits == 16:
        for module, params in named.items():
            for name, value in params.items():
                half = checked_cast(value, torch.float16, f"{module}.{name}")
                tensors[f"{WRAPPER}{module}.{name}"] = half.contiguous()
    else:
        tensors |= pack(named, bits)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", **metadata})


def metadata_of(source: AdapterSource, kind: str, **more: Any) -> dict[str, str]:
    """Return the provenance that goes into a file's metadata, as text."""

    base = source.base or {}
    values = {
        "producer": f"lsr_scale {__version__}",
        "export": kind,
        "method": source.method,
        "base": base.get("name") or source.config.base_model_name_or_path or "",
        "base_quantization": base.get("quantization", "unknown"),
        "base_config_sha256": str(base.get("config_sha256", "")),
        **more,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
