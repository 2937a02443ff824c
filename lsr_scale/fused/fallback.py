"""Reasons to run unfused: of a decoder layer, a call, an adapted linear, a language-model head.

They are looked for at every forward, since anything may have changed in between. When in doubt there is a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from lsr_scale.adapters.joint import JointLinear
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.adapters.peft import AdapterLinear
from lsr_scale.fused.layer_state import LINEARS, layer_linears
from lsr_scale.fused.linear_groups import base_layer
from lsr_scale.layers.frozen_linear import FrozenLinear, FrozenLinear4bit, FrozenLinear8bit

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")

FAMILIES = {"Llama": modeling_llama, "Mistral": modeling_mistral, "Qwen2": modeling_qwen2, "Qwen3": modeling_qwen3}
# each family's causal language model, with its module and name
CAUSAL_LMS = {getattr(module, f"{name}ForCausalLM"): (module, name) for name, module in FAMILIES.items()}


def _submodules(name: str, module: Any) -> dict[str, type]:
    attention, mlp, norm = (getattr(module, name + part) for part in ("Attention", "MLP", "RMSNorm"))
    return {"self_attn": attention, "mlp": mlp, "input_layernorm": norm, "post_attention_layernorm": norm}


# a layer's class, and the classes of its submodules: what computes something else has another class
DECODER_LAYERS = {
    getattr(module, name + "DecoderLayer"): _submodules(name, module) for name, module in FAMILIES.items()
}


@dataclass(frozen=True)
class FallbackCheck:
    """An answer of `layer_fallback_reason`, valid as long as the state that it depends on is the same.

    The full check takes longer than launching the layer's kernels on a small model; comparing states does not.

    Attributes:
        reason: The answer.
        modules: The layer and everything in it but dictionaries of factors; of trials' layers what may change.
        state: Their `_state`.
        base_layers: The frozen linears: q, k, v, o, gate, up, down.
        previous: The answer before, which may hold again.
    """

    reason: str | None
    modules: tuple[nn.Module, ...]
    state: tuple[Any, ...]
    base_layers: tuple[nn.Module, ...]
    previous: "FallbackCheck | None" = None


def layer_fallback_reason(layer: Any) -> str | None:
    """Return why a decoder layer cannot run fused with its modules and adapters as they are, or None."""
    last: FallbackCheck | None = layer.fallback_check
    if last is not None:
        state = _state(layer, last.modules)
        # the one before: an adapter that is switched off for a reference, and on again
        for known in (last, last.previous):
            if known is not None and known.state == state and known.modules == last.modules:
                if known is not last:
                    layer.fallback_check = replace(known, previous=replace(last, previous=None))
                return known.reason
    reason = _check_layer(layer)
    modules = [module for module in layer.modules() if not isinstance(module, nn.ParameterDict | BufferDict)]
    for linear in layer_linears(layer):
        modules += _trials_modules(linear)
    modules = tuple(modules)
    base_layers = tuple(base_layer(linear) for linear in layer_linears(layer))
    previous = None if last is None else replace(last, previous=None)
    layer.fallback_check = FallbackCheck(reason, modules, _state(layer, modules), base_layers, previous)
    return reason


def _trials_modules(linear: nn.Module) -> list[nn.Module]:
    """Return what may change of the layers that trials have in a linear's place, which are no submodules of it."""
    layers = [layer for layer in linear.layers if layer is not None] if isinstance(linear, JointLinear) else []
    changing = BaseTunerLayer | nn.ModuleDict | nn.Dropout
    return [module for layer in layers for module in layer.modules() if isinstance(module, changing)]


def _state(layer: Any, modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Return all that `_check_layer` depends on, to be compared: modules by identity, the rest by value."""
    attention = layer.self_attn
    config = attention.config
    state: list[Any] = [
        *(config._attn_implementation, getattr(config, "is_causal", True)),
        *(attention.is_causal, attention.attention_dropout),
    ]
    for module in modules:
        attributes = module.__dict__  # ten times as fast as asking the module
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if attributes[name]:
                state.append(tuple(attributes[name].values()))
        for parameter in attributes["_parameters"].values():
            if parameter is not None:
                state.append((parameter.requires_grad, parameter.is_cuda))
        # p is a dropout's
        common = module.__class__, "forward" in attributes, attributes["training"], attributes.get("p")
        state.append((*common, *attributes["_modules"].values()))
        if isinstance(module, BaseTunerLayer):
            active = module._active_adapter
            names = active if isinstance(active, str) else tuple(active)
            merged = tuple(attributes["merged_adapters"])
            variants = tuple(attributes.get("lora_variant") or ()), tuple((attributes.get("lora_bias") or {}).items())
            flags = attributes["_disable_adapters"], attributes.get("per_sample") is None
            state.append((names, flags, merged, variants))
    return tuple(state)


def _check_layer(layer: Any) -> str | None:
    if "forward" in layer.__dict__:
        return "the layer has a forward of its own (a device map or a patch)"
    for name, expected in DECODER_LAYERS[layer.original].items():
        part = getattr(layer, name)
        if type(part) is not expected:
            return f"{name} is a {type(part).__name__}, not a {expected.__name__}"
    attention = layer.self_attn
    if attention.config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        wanted = " or ".join(ATTENTION_IMPLEMENTATIONS)
        return f"attn_implementation is {attention.config._attn_implementation!r}; it must be {wanted}"
    if not attention.is_causal or getattr(attention.config, "is_causal", True) is False:
        return "its attention is not causal"
    if layer.training and attention.attention_dropout:
        return f"attention_dropout is {attention.attention_dropout}, and training"
    if not isinstance(layer.mlp.act_fn, SiLUActivation | nn.SiLU):
        return f"the activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
    for linear in layer_linears(layer):
        reason = linear_fallback_reason(linear)
        if reason:
            return reason
    for name in DECODER_LAYERS[layer.original]:
        part = getattr(layer, name)
        children = {key: child for key, child in part.named_children() if key not in LINEARS.get(name, ())}
        for key, child in {"": part, **children}.items():
            reason = _submodule_reason(f"{name}.{key}".rstrip("."), child)
            if reason:
                return reason
    return None


def linear_fallback_reason(linear: Any) -> str | None:
    """Return why a linear layer, adapted or not, cannot take part as it stands, or None."""
    base, children = base_layer(linear), linear.named_modules(prefix="a linear layer")
    if type(base) not in (nn.Linear, FrozenLinear, FrozenLinear4bit, FrozenLinear8bit):
        return f"a base layer is {type(base).__name__}"
    if base.in_features % 8:
        return f"a base layer has {base.in_features} inputs, no multiple of 8"
    if isinstance(linear, BaseTunerLayer):
        reason = _adapter_reason(linear)
        if reason:
            return reason
    if isinstance(linear, JointLinear):
        reason = _trials_reason(linear)
        if reason:
            return reason
    for name, child in children:
        reason = _submodule_reason(name, child)
        if reason:
            return reason
    return None


def _trials_reason(linear: JointLinear) -> str | None:
    for trial, (layer, adapter) in enumerate(zip(linear.layers, linear.adapters, strict=True)):
        if layer is None:
            continue
        reason = _adapter_reason(layer)
        if reason is None and active_adapters(layer) != ([] if adapter is None else [adapter]):
            reason = "its active adapters are several, or others than at first"
        for name, child in layer.named_modules(prefix="a linear layer"):
            reason = reason or _submodule_reason(name, child)
        if reason:
            return f"trial {trial}: {reason}"
    return None


def _adapter_reason(linear: Any) -> str | None:
    adapters = active_adapters(linear)
    if isinstance(linear, AdapterLinear):
        if not linear.method.is_low_rank():
            return f"{linear.method.name} has no low-rank pair"
        dropouts = linear.adapter_dropout
    elif isinstance(linear, LoraLayer):
        if linear.lora_variant:
            return "a LoRA variant (DoRA and the like)"
        if any(linear.lora_bias.values()):
            return "LoRA with a bias of its own"
        dropouts = linear.lora_dropout
    else:
        return f"the adapter is {_kind_of(linear)}"
    if linear.merged:
        return "an adapter is merged"
    if getattr(linear, "per_sample", None) is not None:
        return "the samples of the batch use different adapters"
    for adapter in adapters:
        dropout: Any = dropouts[adapter.name]
        if dropout.training and getattr(dropout, "p", 0):
            return "dropout on the adapter's input, and training"
    return None


def _kind_of(adapted: Any) -> str:
    """Return what PEFT calls an adapter that is neither ours nor LoRA: its class may be any Linear."""
    package = type(adapted).__module__.split(".")
    return package[2] if package[:2] == ["peft", "tuners"] else type(adapted).__name__


def _submodule_reason(name: str, child: nn.Module) -> str | None:
    reason = skipped_reason(name, child)
    if reason:
        return reason
    if not _has_factors(child, name) and any(p.requires_grad for p in child.parameters(recurse=False)):
        return f"{name} is trained itself"
    return None


def skipped_reason(name: str, child: nn.Module, has_own: bool | None = None) -> str | None:
    """Return why a module's call must not be skipped, or None: something besides its class's forward happens there.

    Args:
        name: What the module is called.
        child: The module.
        has_own: Whether it has a forward of its own that matters; by default any does.
    """
    if "forward" in child.__dict__ if has_own is None else has_own:
        return f"{name} has a forward of its own (a device map or a patch)"
    hooks = [child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks]
    # transformers' output-capturing hooks do nothing unless outputs are asked for, see call_fallback_reason
    harmless = "transformers.utils.output_capturing"
    if any(not hook.__module__.startswith(harmless) for kind in hooks for hook in kind.values()):
        return f"{name} has hooks"
    return None


def _has_factors(child: nn.Module, name: str) -> bool:
    """Tell whether a module's own parameters are an adapter's: PEFT's LoRA has linears in dicts of that name."""
    return isinstance(child, nn.ParameterDict) or any(
        part in LoraLayer.adapter_layer_names for part in name.split(".")[:-1]
    )


def call_fallback_reason(layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> str | None:
    """Return why a layer cannot run fused on these arguments, or None."""
    if arguments.get("past_key_values") is not None:
        return "a key/value cache is in use"
    if arguments.get("output_attentions"):
        return "attention weights are asked for"
    if arguments.get("is_causal") is False:
        return "attention that is not causal is asked for"
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != hidden.dtype:
        wanted = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        return f"hidden states are {hidden.dtype} under autocast to {wanted}; load the model in {wanted}"
    for base in layer.fallback_check.base_layers:
        compute = base.__dict__.get("compute_dtype")
        if compute not in (None, hidden.dtype):
            return f"hidden states are {hidden.dtype}, but the 4-bit layers compute in {compute}"
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        return "the attention mask is not four-dimensional"
    return None


def lm_head_fallback_reason(model: Any, arguments: dict[str, Any]) -> str | None:
    """Return why a causal language model's loss must be computed with logits, or None."""
    head = model.lm_head
    if not isinstance(head, ModulesToSaveWrapper) and type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__name__}"
    if head.bias is not None:
        return "lm_head has a bias"
    check = skipped_reason if isinstance(head, ModulesToSaveWrapper) else _submodule_reason
    for name, child in head.named_modules(prefix="lm_head"):
        reason = check(name, child)
        if reason:
            return reason
    if getattr(model, "_loss_function", None) is not None or model.loss_type not in (None, "ForCausalLM"):
        return "the model has a loss of its own"
    if arguments.get("return_dict") is False:
        return "return_dict is False"
    for name, default in (("ignore_index", -100), ("logits_to_keep", 0)):
        given = arguments.get(name)
        if given is not None and (isinstance(given, Tensor) or given != default):
            return f"{name} is given"
    return None
