"""Exact sizes in bytes, without weights: the frozen base as bitsandbytes stores it, and an adapter's file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lsr_scale.adapters.peft import in_out_features
from lsr_scale.model import head_modules

# bitsandbytes: elements per 4-bit block, blocks per second-level block
BLOCK, NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class FrozenBytes:
    """Bytes of the frozen base: matrices, which stage 3 shards, and `state`, which it does not: all else.

    That is vectors, quantization states, buffers, and what trains. `embedding` and `head` are those among the matrices,
    and one if they are tied. `largest` is the most that one weight takes while it is made: unquantized and quantized,
    or that of all experts and each of theirs, which it is joined of.
    """

    matrices: int
    state: int
    embedding: int = 0
    head: int = 0
    tied: bool = False
    largest: int = 0

    @property
    def layers(self) -> int:
        """The matrices but for the embedding and the head."""
        return self.matrices - self.head - (0 if self.tied else self.embedding)

    @property
    def total(self) -> int:
        """All of it."""
        return self.matrices + self.state


def quantized_layers(model: Any, skipped: Sequence[str] = ()) -> list[str]:
    """Return the linear layers of a meta model that quantization replaces.

    Args:
        model: The model.
        skipped: Patterns of more that it leaves, as a checkpoint lists them that is quantized already.
    """
    heads = head_modules(model)
    kept = [*(heads or ()), *skipped] if skipped else heads
    skip = HfQuantizer.get_modules_to_not_convert(model, kept, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, skip)
    ]


def frozen_bytes(
    model: nn.Module,
    quantized: list[str],
    quantization: str,
    double_quantization: bool,
    replicated: Sequence[str] = (),
) -> FrozenBytes:
    """Return the exact bytes of a base as bitsandbytes stores it, from its meta model.

    4-bit: two weights per byte; a float32 scale per block of 64, or with double quantization a uint8 scale per block, a
    float32 scale per 256 blocks and one float32 offset; a table of 16 float32 values per layer, and one of 256 for all.
    int8: a byte a weight and a float32 scale per row. Everything else in its dtype, tied weights once.

    Args:
        model: The meta model.
        quantized: Names of the layers that are.
        quantization: As in a run.
        double_quantization: As in a run.
        replicated: As `Sharding` takes them: ends of the names of modules that stage 3 does not shard.
    """
    whole = [module for name, module in model.named_modules() if replicated and name.endswith(tuple(replicated))]
    kept = {id(parameter) for module in whole for parameter in module.parameters()}
    weights = {id(model.get_submodule(name).weight): model.get_submodule(name) for name in quantized}
    matrices = state = largest = 0
    for parameter in model.parameters():  # each once
        layer = weights.get(id(parameter)) if quantization != "none" else None
        if layer is None:
            size = parameter.numel() * parameter.element_size()
            largest = max(largest, size * (2 if parameter.dim() > 2 else 1))
            if parameter.dim() > 1 and id(parameter) not in kept:
                matrices += size
            else:
                state += size
            continue
        count = parameter.numel()
        blocks = -(-count // BLOCK)
        if quantization == "int8":
            sides = in_out_features(layer)
            assert sides is not None
            stored, extra = count, 4 * sides[1]
        else:
            stored = -(-count // 2)
            nested = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + 256 * 4
            extra = 16 * 4 + (nested if double_quantization else 4 * blocks)
        matrices, state = matrices + stored, state + extra
        # int8 is made from a copy in float16; 4-bit scales are float32 before they are quantized themselves
        between = 2 * count if quantization == "int8" else 4 * blocks
        largest = max(largest, count * parameter.element_size() + between + stored)
    buffers = {id(buffer): buffer.numel() * buffer.element_size() for buffer in model.buffers()}
    ends: Any = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    embedding, head = (None if module is None else module.weight for module in ends)
    of_ends = [0 if one is None or id(one) in kept else one.numel() * one.element_size() for one in (embedding, head)]
    return FrozenBytes(
        matrices,
        state + sum(buffers.values()),
        *of_ends,
        tied=head is not None and head is embedding,
        largest=largest,
    )


def adapter_file_bytes(model: Any) -> int:
    """Return the size of `adapter_model.safetensors` that PEFT will write: header and data."""
    tensors = peft.get_peft_model_state_dict(model)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + offset
