"""How a base is quantized by bitsandbytes: its configuration, and what a quantized checkpoint allows."""

from typing import Literal

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


def check_quantization(config: PreTrainedConfig, quantization: Quantization, name: str) -> None:
    """Refuse a quantization other than the one of a checkpoint that is quantized already.

    Transformers would silently take the checkpoint's.

    Raises:
        UserError: naming both.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    given = given if isinstance(given, dict) else given.to_dict() if hasattr(given, "to_dict") else None
    if given is None:
        raise UserError(f"model.name {name!r}: quantization_config in its config.json is no mapping; remove it")
    method = str(given.get("quant_method") or "bitsandbytes")
    if given.get("load_in_8bit"):
        own = "int8"
    elif given.get("load_in_4bit"):
        own = str(given.get("bnb_4bit_quant_type", "fp4"))
    else:
        raise UserError(
            f"model.name {name!r}: its weights are quantized already, by {method[:40]}; adapters are trained here on "
            "weights that bitsandbytes quantizes, or none: take the model's unquantized weights"
        )
    if own != quantization:
        raise UserError(
            f"model.quantization: {quantization}, but the weights of {name!r} are quantized already, in {own[:40]}; "
            f"set it to {own[:40]}, or take the model's unquantized weights"
        )
