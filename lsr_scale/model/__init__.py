"""The base model: found by its name, loaded, quantized and frozen, and recognized again beside its adapter."""

from lsr_scale.model.base import (
    DTYPES,
    Quantization,
    Task,
    base_of,
    check_quantization,
    head_modules,
    load_base,
    load_config,
    local_device,
    model_class,
    quantization_config,
    skeleton,
)
from lsr_scale.model.names import resolve
from lsr_scale.model.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer, tokenizer_of

__all__ = [
    "DTYPES",
    "Quantization",
    "Task",
    "base_of",
    "check_quantization",
    "head_modules",
    "load_base",
    "load_config",
    "load_tokenizer",
    "local_device",
    "model_class",
    "quantization_config",
    "read_tokenizer",
    "resolve",
    "save_tokenizer",
    "skeleton",
    "tokenizer_of",
]
