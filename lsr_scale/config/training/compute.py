"""What computes, in which precision, and what memory is spent on: fused layers, 8 bits, graphs, checkpointing."""

from collections.abc import Mapping
from typing import Any, Literal

from lsr_scale.config.training.subject import Subject

# Linears of a decoder layer that read one input, as training.keep_in_bf16 names them: down, or 12.down of one layer.
LINEAR_GROUPS = ("qkv", "o", "gate_up", "down")

# transformers 5.23 renames the first of each pair to the second; both are taken with every version.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

_NO_AUTOCAST = (
    "the base runs in model.dtype and the adapter's factors stay float32, so autocast is always off: set model.dtype"
)
_NO_CAST = "it would cast the adapter's float32 factors: set model.dtype"

COMPUTE = Subject(
    defaults={
        "gradient_checkpointing": None,  # null: as memory has it
        "fused": "auto",
        "compute": "bf16",
        "keep_in_bf16": "auto",
        "compute_tolerance": 0.1,
        "cuda_graphs": "auto",
        "memory": "auto",
    },
    bounds={
        "torch_empty_cache_steps": {"ge": 1, "le": 10**9},
        "compute_tolerance": {"gt": 0},
    },
    own={
        "fused": (
            Literal["auto", "on", "off"],
            "Run decoder layers fused: 'on', 'off', or 'auto' (on a GPU). Fused layers do their own checkpointing.",
        ),
        "compute": (
            Literal["bf16", "fp8", "int8"],
            "How fused layers multiply by the frozen weights: 'bf16'; 'fp8' (e4m3 forward and backward, the fastest); "
            "or 'int8' (forward in int8 after a Hadamard rotation, a third of the rounding error; backward in e4m3). "
            "The latter two need a GPU of compute capability 8.9 or more. What is trained, norms, attention and the "
            "loss stay in bfloat16 or float32.",
        ),
        "keep_in_bf16": (
            Literal["auto"] | list[str],
            "With compute: fp8 or int8, the groups of linears that stay in bfloat16: of qkv, o, gate_up and down, in "
            "all layers ('down') or in one ('12.down'). 'auto': those whose error in the first step exceeds "
            "compute_tolerance.",
        ),
        "compute_tolerance": (
            float,
            "With keep_in_bf16: auto, the tolerated relative error in 8 bits of a group's outputs, and of its input "
            "gradients.",
        ),
        "cuda_graphs": (
            Literal["auto", "on", "off"],
            "Replay training steps as CUDA graphs: 'on', 'off', or 'auto' (where the host would take longer to launch "
            "a step than the GPU to compute it: with small models, and with compute: fp8 or int8 with 7B ones too). "
            "Needs fused layers, packing or padding_free, no dropout, one process.",
        ),
        "memory": (
            Literal["auto", "save", "speed"],
            "What memory is spent on: 'save' keeps each layer's input and recomputes the rest, 'speed' keeps "
            "everything, in fused layers the dequantized weights too, 'auto' starts as 'save' and lets fused layers "
            "keep what fits after the first step.",
        ),
    },
    owned={
        "bf16": _NO_AUTOCAST,
        "fp16": _NO_AUTOCAST,
        "bf16_full_eval": _NO_CAST,
        "fp16_full_eval": _NO_CAST,
    },
)


def wants_fused(training: Mapping[str, Any], pays: bool) -> bool:
    """Tell whether `training.fused` lets layers run fused: on, or auto where it pays, which is on a GPU."""
    return training["fused"] == "on" or (training["fused"] == "auto" and pays)


def checkpoints_layers(training: Mapping[str, Any]) -> bool:
    """Tell whether a run's layers recompute activations in the backward pass, in its first step at least."""
    chosen = training["gradient_checkpointing"]
    return training["memory"] != "speed" if chosen is None else chosen
