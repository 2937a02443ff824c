"""How a base is quantized by bitsandbytes: its configuration, and what a quantized checkpoint allows."""

import copy
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from lsr_scale.errors import UserError

Quantization = Literal["nf4", "fp4", "int8", "none"]


def quantization_config(
    quantization: Quantization, double_quantization: bool, dtype: torch.dtype, skip: list[str] | None
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' configuration, None for "none".

    The 4-bit storage is always uint8: DeepSpeed's engine casts packed weights of any floating storage dtype other than
    its own, which destroys them silently.
    """
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip,
    )


def store_as_bytes(weight: Any) -> None:
    """Have 4-bit codes that a checkpoint stores in another dtype, as those for FSDP do, be the bytes that they are.

    As any floating dtype DeepSpeed's engine would cast them, and bitsandbytes' CPU kernel cannot read them.

    Args:
        weight: A parameter; one that is not of 4-bit codes, or is of bytes, stays as it is.
    """
    if isinstance(weight, bnb.nn.Params4bit) and weight.bnb_quantized and weight.dtype != torch.uint8:
        weight.data = weight.data.contiguous().view(-1).view(torch.uint8).view(-1, 1)
        weight.quant_storage = torch.uint8
        if weight.module is not None:
            weight.module.quant_storage = torch.uint8


def skip_quantization(config: PreTrainedConfig, modules: list[str]) -> PreTrainedConfig:
    """Return the configuration of a checkpoint that is quantized already, by which these modules are not.

    Where it has no list of such modules Transformers finds the head by itself.
    """
    config = copy.deepcopy(config)
    if (skipped := skipped_modules(config)) is not None:
        skipped += modules
    return config


def skipped_modules(config: PreTrainedConfig) -> list[str] | None:
    """Return the list, itself, of modules that a checkpoint which is quantized already has unquantized, if any."""
    given: Any = getattr(config, "quantization_config", None)
    own = given if isinstance(given, dict) else vars(given) if given is not None else {}
    return own.get("llm_int8_skip_modules")


def own_quantization(config: PreTrainedConfig, name: str) -> Quantization | None:
    """Return in what a checkpoint is quantized already, None where it is not.

    Raises:
        UserError: for one that bitsandbytes did not quantize.
    """
    return _own(config, name)[0]


def check_quantization(config: PreTrainedConfig, quantization: Quantization, name: str) -> bool | None:
    """Refuse a quantization other than the one of a checkpoint that is quantized already.

    Transformers would silently take the checkpoint's.

    Returns:
        Whether the checkpoint's scales are quantized too; None where it is not quantized.

    Raises:
        UserError: naming both.
    """
    own, nested = _own(config, name)
    if own is None:
        return None
    if own != quantization:
        raise UserError(
            f"model.quantization: {quantization}, but the weights of {name!r} are quantized already, in {own}; "
            f"set it to {own}, or take the model's unquantized weights"
        )
    return nested


def _own(config: PreTrainedConfig, name: str) -> tuple[Quantization | None, bool]:
    """Return in what a checkpoint is quantized already, if at all, and whether its scales are quantized too."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None, False
    given = given if isinstance(given, dict) else given.to_dict() if hasattr(given, "to_dict") else None
    if given is None:
        raise UserError(f"model.name {name!r}: quantization_config in its config.json is no mapping; remove it")
    method = str(given.get("quant_method") or "bitsandbytes")
    if given.get("load_in_4bit") and not given.get("load_in_8bit"):
        own = str(given.get("bnb_4bit_quant_type", "fp4"))
        method += f" in {own}"
    else:
        own = "int8" if given.get("load_in_8bit") else None
    if own not in ("int8", "nf4", "fp4"):
        raise UserError(
            f"model.name {name!r}: its weights are quantized already, by {method[:40]}; adapters are trained here on "
            "weights that bitsandbytes quantizes in nf4, fp4 or int8, or none: take the model's unquantized weights"
        )
    return own, bool(given.get("bnb_4bit_use_double_quant"))
