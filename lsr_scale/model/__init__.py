"""The base model: found by its name, loaded, quantized, frozen and sharded; its tokenizer."""

from lsr_scale.model.architecture import DTYPES, Task, head_modules, load_config, meta_model, model_class
from lsr_scale.model.dtype import chosen_dtype, without_bfloat16
from lsr_scale.model.load import load_base, load_base_for, local_device
from lsr_scale.model.names import resolve
from lsr_scale.model.quantize import (
    Quantization,
    check_quantization,
    own_quantization,
    quantization_config,
    skipped_modules,
)
from lsr_scale.model.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer, tokenizer_of

__all__ = [
    "DTYPES",
    "Quantization",
    "Task",
    "check_quantization",
    "chosen_dtype",
    "head_modules",
    "load_base",
    "load_base_for",
    "load_config",
    "load_tokenizer",
    "local_device",
    "meta_model",
    "model_class",
    "own_quantization",
    "quantization_config",
    "read_tokenizer",
    "resolve",
    "save_tokenizer",
    "skipped_modules",
    "tokenizer_of",
    "without_bfloat16",
]
