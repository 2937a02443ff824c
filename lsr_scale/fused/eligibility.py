"""Which layers can run fused, and why not: decided at every forward, since any of it may change in between."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from lsr_scale.adapters.base import AdapterLinear
from lsr_scale.fused.decoder_layer import linears_of
from lsr_scale.fused.groups import base_of
from lsr_scale.fused.pairs import active_adapters
from lsr_scale.quantized import FrozenLinear4bit, FrozenLinear8bit

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
_SUBMODULES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def why_not_layer(layer: Any) -> str | None:
    """Return why a decoder layer cannot run fused as it stands, or None: a matter of its modules and adapters."""
    config = layer.self_attn.config
    if config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        wanted = " or ".join(ATTENTION_IMPLEMENTATIONS)
        return f"attn_implementation is {config._attn_implementation!r}; it must be {wanted}"
    if layer.training and config.attention_dropout:
        return f"attention_dropout is {config.attention_dropout}, and training"
    if not isinstance(layer.mlp.act_fn, SiLUActivation | nn.SiLU):
        return f"the activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
    for linear in linears_of(layer):
        reason = why_not_linear(linear)
        if reason:
            return reason
    for name in _SUBMODULES:
        for child_name, child in getattr(layer, name).named_modules(prefix=name):
            reason = _why_not_child(child_name, child)
            if reason:
                return reason
    return None


def why_not_linear(linear: Any) -> str | None:
    """Return why a linear layer, adapted or not, cannot take part as it stands, or None."""
    base = base_of(linear)
    module = linear
    if type(base) not in (nn.Linear, FrozenLinear4bit, FrozenLinear8bit):
        return f"a base layer is {type(base).__name__}"
    if isinstance(linear, AdapterLinear):
        if not linear.method.is_low_rank():
            return f"{linear.method.name} has no low-rank pair"
        dropouts = linear.adapter_dropout
    elif isinstance(linear, LoraLayer):
        if linear.lora_variant or any(linear.use_rslora.get(name) is None for name in linear.lora_A):
            return "a LoRA variant (DoRA and the like)"
        if any(linear.lora_bias.values()):
            return "LoRA with a bias of its own"
        dropouts = linear.lora_dropout
    elif isinstance(linear, BaseTunerLayer):
        return f"an adapter of type {type(linear).__name__}"
    else:
        return None
    if linear.merged:
        return "an adapter is merged"
    for adapter in active_adapters(module):
        dropout: Any = dropouts[adapter.name]
        if dropout.training and getattr(dropout, "p", 0):
            return "dropout on the adapter's input, and training"
    return None


def _why_not_child(name: str, child: nn.Module) -> str | None:
    if "forward" in child.__dict__:
        return f"{name} has a forward of its own (a device map or a patch)"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"{name} has hooks"
    trains_itself = not isinstance(child, BaseTunerLayer | nn.ParameterDict | nn.ModuleDict)
    if trains_itself and "lora_" not in name and any(p.requires_grad for p in child.parameters(recurse=False)):
        return f"{name} is trained itself"
    return None


def why_not_call(hidden: Tensor, arguments: dict[str, Any]) -> str | None:
    """Return why a layer cannot run fused on these arguments, or None."""
    if arguments.get("past_key_values") is not None:
        return "a key/value cache is in use"
    if arguments.get("output_attentions"):
        return "attention weights are asked for"
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != hidden.dtype:
        wanted = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        return f"hidden states are {hidden.dtype} under autocast to {wanted}; load the model in {wanted}"
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        return "the attention mask is not four-dimensional"
    return None
