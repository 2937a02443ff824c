"""A base model with random weights instead of a checkpoint's, to measure speed and memory.

Each layer is quantized as soon as it is initialized, so a 7B model in 4 bits needs little more than its 4 bits.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers import AutoHfQuantizer


def init_random_weights(
    model: PreTrainedModel,
    quantizer: BitsAndBytesConfig | None,
    device: torch.device,
    shard: Callable[[nn.Module], None] = lambda module: None,
) -> PreTrainedModel:
    """Give a model on the meta device the random weights of its architecture's initialization, in place.

    Args:
        model: The model, see `lsr_scale.model.meta_model`.
        quantizer: How to quantize its linear layers; None leaves them in their dtype.
        device: Device of the weights, which are deterministic by torch's seed, per kind of device.
        shard: Called with each module as soon as it has its weights, see `lsr_scale.model.shard.Sharding`.

    Returns:
        The model, in eval mode, as `from_pretrained` would have returned it.
    """
    hub_quantizer: Any = None
    if quantizer is not None:
        hub_quantizer = AutoHfQuantizer.from_config(quantizer, pre_quantized=False)
        # creates layers in the default dtype, which from_pretrained sets for it
        with local_torch_dtype(model.dtype, type(model).__name__):
            hub_quantizer.preprocess_model(model=model, device_map={"": device})
    for module in list(model.modules()):
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            _quantize(model, module, device)
        else:
            module.to_empty(device=device, recurse=False)
            if _has_matrices(module):
                _init(model, module)
        if _has_matrices(module):
            shard(module)  # at once: these have all but a few of a model's bytes
    model.initialize_weights()  # skips parameters with _is_hf_initialized
    model.tie_weights()
    shard(model)
    if hub_quantizer is not None:
        model.hf_quantizer = hub_quantizer  # pyright: ignore[reportAttributeAccessIssue]
        hub_quantizer.postprocess_model(model)
    model.config.name_or_path = f"{model.config.name_or_path or model.config.model_type} (random weights)"
    return model.eval()


def _has_matrices(module: nn.Module) -> bool:
    """Tell whether a module has matrices of its own, as linear layers, embeddings and experts do."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _init(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialize the parameters of one module, and mark them as initialized."""
    model._init_weights(module)
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]


def _quantize(model: PreTrainedModel, layer: Any, device: torch.device) -> None:
    """Initialize the weight of one layer as the model would, and quantize it."""
    dtype = layer.weight.dtype
    with torch.device(device):
        full = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
    model._init_weights(full)
    parameter: Any = type(layer.weight)
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = parameter(full.weight.data, requires_grad=False, **layer.weight.__dict__).to(device)
    else:
        codes, scales, _ = functional.int8_vectorwise_quant(full.weight.data.to(torch.float16))
        weight = parameter(codes, requires_grad=False, CB=codes, SCB=scales)
    weight._is_hf_initialized = True
    layer.weight = weight
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=layer.bias.dtype, device=device), False)
