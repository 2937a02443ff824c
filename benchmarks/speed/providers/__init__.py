"""The providers of `throughput.py`, by name: who trains the adapter whose steps are timed.

This file imports nothing heavy: every worker imports it first, and Unsloth wants to come before Transformers.
"""

import importlib

PROVIDERS = {
    "lsr": "fused:LsrAdapter",
    "kron_lora": "fused:KronLoraAdapter",
    "lora": "fused:LoraAdapter",
    "frozen": "fused:Frozen",
    "lsr_held": "fused:LsrCachedWeights",
    "lsr_graphs": "fused:LsrGraphs",
    "lora_graphs": "fused:LoraGraphs",
    "kron_lora_graphs": "fused:KronLoraGraphs",
    "lsr_fp8": "fused:LsrFp8",
    "kron_lora_fp8": "fused:KronLoraFp8",
    "lora_fp8": "fused:LoraFp8",
    "frozen_fp8": "fused:FrozenFp8",
    "lsr_graphs_fp8": "fused:LsrGraphsFp8",
    "lora_graphs_fp8": "fused:LoraGraphsFp8",
    "kron_lora_graphs_fp8": "fused:KronLoraGraphsFp8",
    "lsr_int8": "fused:LsrInt8",
    "kron_lora_int8": "fused:KronLoraInt8",
    "lora_int8": "fused:LoraInt8",
    "frozen_int8": "fused:FrozenInt8",
    "lsr_graphs_int8": "fused:LsrGraphsInt8",
    "lora_graphs_int8": "fused:LoraGraphsInt8",
    "kron_lora_graphs_int8": "fused:KronLoraGraphsInt8",
    "lsr_unfused": "fused:LsrUnfused",
    "peft_lora": "peft_lora:PeftLora",
    "peft_lora_float32": "peft_lora:PeftLoraFloat32",
    "peft_lora_liger": "peft_lora:PeftLoraLiger",
    "peft_kbit_liger": "peft_lora:PeftKbitLiger",
    "peft_frozen_liger": "peft_lora:PeftFrozenLiger",
    "peft_lokr": "peft_lora:PeftLokr",
    "unsloth_lora": "unsloth_lora:UnslothLora",
}


# what the base's products are computed in beside bf16: the last word of a provider's name
EIGHT_BIT = ("fp8", "int8")


def compute_of(provider: str) -> str:
    """Return what a provider computes the base's products in: "bf16", "fp8" or "int8"."""
    ending = provider.rpartition("_")[2]
    return ending if ending in EIGHT_BIT else "bf16"


def bf16_of(provider: str) -> str:
    """Return the name of the same provider that computes in bf16."""
    return provider.removesuffix(f"_{compute_of(provider)}")


class MissingError(Exception):
    """A provider's package, or the part of this library that it measures, is not there."""


def find_provider(name: str) -> type:
    """Return a provider's class: one of `PROVIDERS`, or `module:Class` for one from elsewhere."""
    place = f"{__name__}.{PROVIDERS[name]}" if name in PROVIDERS else name
    module, _, attribute = place.partition(":")
    provider_class = getattr(importlib.import_module(module), attribute)
    provider_class.name = name
    return provider_class
