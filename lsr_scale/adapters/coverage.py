"""What was asked of a base and not done: weights that no quantization reaches, and that no adapter does."""

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import bitsandbytes as bnb
from torch import nn

from lsr_scale.adapters.identity import base_modules
from lsr_scale.adapters.peft import features
from lsr_scale.model.architecture import head_modules
from lsr_scale.model.shard import full_numel

# of all weights; less is not worth a line (routers, biases of attention)
WORTH_SAYING = 0.001


def left_out(
    model: Any, quantization: str, targets: Any, dtype: str, quantized: Collection[str] | None = None
) -> list[str]:
    """Return a line for what a loaded and adapted model does not do of what was asked, with its share of the weights.

    Embeddings and heads are never quantized, and left to the user to adapt: they are not spoken of.

    Args:
        model: The base with its adapter, loaded or on the meta device.
        quantization: How linear layers were to be held.
        targets: The adapter's `target_modules` as the user wrote it.
        dtype: Name of the dtype that the rest is held in.
        quantized: Names of the layers that will be quantized, where the model is on the meta device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = tuple(f"{name}." for name in head_modules(base) or ())
    total, matrices = 0, {}  # of those that are no embedding and in no head: numbers of weights and how they are held
    for path, module in base_modules(model):
        sides = features(module)
        for name, parameter in module.named_parameters(recurse=False):
            packed = sides is not None and name == "weight"
            size = sides[0] * sides[1] if packed and sides else full_numel(parameter)
            total += size
            is_matrix = packed or len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            if is_matrix and not isinstance(module, nn.Embedding) and not f"{path}.".startswith(heads):
                done = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) or path in (quantized or ())
                matrices[f"{path}.{name}" if not packed else path] = (size, done, packed)
    lines = []
    if quantization != "none":
        plain = {name: size for name, (size, done, _) in matrices.items() if not done}
        if sum(plain.values()) > WORTH_SAYING * total:
            lines.append(
                f"model.quantization: {_share(plain, total)} held in {dtype}, not in {quantization}: bitsandbytes "
                "quantizes linear layers alone, and passes over some that the model wants left as they are"
            )
    if targets == "all-linear":
        bare = {name: size for name, (size, _, is_linear) in matrices.items() if not is_linear}
        if sum(bare.values()) > WORTH_SAYING * total:
            lines.append(
                f"adapter.target_modules: {_share(bare, total)} not adapted: all-linear means linear layers, and these "
                "are held in one tensor for many, as experts are"
            )
    return lines


def _share(sizes: dict[str, int], total: int) -> str:
    """Return names, the largest first and layers' numbers left out, with their share of all weights and a verb."""
    by_name: Counter[str] = Counter()
    for name, size in sizes.items():
        by_name[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += size
    names = [name for name, _ in by_name.most_common(3)]
    more = f" and {len(by_name) - 3} more" if len(by_name) > 3 else ""
    verb = "is" if len(by_name) == 1 else "are"
    return f"{', '.join(names)}{more} ({100 * sum(sizes.values()) / total:.2g} % of the base's weights) {verb}"
