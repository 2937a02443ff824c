"""Which of a base's weights neither quantization nor the adapter covers although the run asks for it."""

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import bitsandbytes as bnb
from torch import nn

from lsr_scale.adapters.identity import base_modules
from lsr_scale.adapters.peft import in_out_features
from lsr_scale.model.architecture import head_modules
from lsr_scale.model.shard import full_numel

# share of all weights below which there is no note (routers, biases of attention)
MIN_SHARE = 0.001


def coverage_notes(
    model: Any, quantization: str, targets: Any, dtype: str, quantized: Collection[str] | None = None
) -> list[str]:
    """Return a note for each kind of weights that are not quantized, or not adapted, as asked, with their share.

    Embeddings and heads are left out: they are never quantized, and adapted only by name.

    Args:
        model: The base with its adapter, loaded or on the meta device.
        quantization: The quantization that the run asks for.
        targets: The adapter's `target_modules` as the user wrote it.
        dtype: Name of the dtype of what is not quantized.
        quantized: Names of the layers that will be quantized, where the model is on the meta device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = tuple(f"{name}." for name in head_modules(base) or ())
    total, matrices = 0, {}  # (number of weights, is quantized, is linear) but for embeddings and heads
    for path, module in base_modules(model):
        shape = in_out_features(module)
        for name, parameter in module.named_parameters(recurse=False):
            is_linear = shape is not None and name == "weight"
            size = shape[0] * shape[1] if is_linear and shape else full_numel(parameter)
            total += size
            is_matrix = is_linear or len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            if is_matrix and not isinstance(module, nn.Embedding) and not f"{path}.".startswith(heads):
                is_quantized = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) or path in (quantized or ())
                matrices[path if is_linear else f"{path}.{name}"] = (size, is_quantized, is_linear)
    notes = []
    if quantization != "none":
        unquantized = {name: size for name, (size, is_quantized, _) in matrices.items() if not is_quantized}
        if sum(unquantized.values()) > MIN_SHARE * total:
            notes.append(
                f"model.quantization: {_share(unquantized, total)} {dtype}, not {quantization}: "
                "bitsandbytes quantizes linear layers only, and skips those that the model excludes"
            )
    if targets == "all-linear":
        unadapted = {name: size for name, (size, _, is_linear) in matrices.items() if not is_linear}
        if sum(unadapted.values()) > MIN_SHARE * total:
            notes.append(
                f"adapter.target_modules: {_share(unadapted, total)} not adapted: all-linear means linear layers, and "
                "these are parameters of many in one tensor, as experts are"
            )
    return notes


def _share(sizes: dict[str, int], total: int) -> str:
    """Return names, the largest first and the indices of layers as `*`, with their share of all weights and a verb."""
    by_name: Counter[str] = Counter()
    for name, size in sizes.items():
        by_name[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += size
    names = [name for name, _ in by_name.most_common(3)]
    more = f" and {len(by_name) - 3} more" if len(by_name) > 3 else ""
    verb = "is" if len(by_name) == 1 else "are"
    return f"{', '.join(names)}{more} ({100 * sum(sizes.values()) / total:.2g} % of the base's weights) {verb}"
