"""Why a model does not decode with a cache of fixed size: the list of reasons, where transformers' own generation does.

Also what the decoder asks of a model: its tuner, and the names of its arguments.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import PeftModel

from lsr_scale.adapters.peft import AdapterModel


def decoder_fallback_reason(model: Any, length: int, adapter_names: Sequence[str] | None = None) -> str | None:
    """Return why a model cannot decode with a cache of fixed size, or None.

    Args:
        model: The model.
        length: The tokens of its longest row, prompt and answer.
        adapter_names: An adapter a row, if rows have different ones.
    """
    tuner = tuner_of(model)
    base = base_of(model)
    config, kind = base.config, type(base).__name__
    if config.is_encoder_decoder:
        return f"{kind} is an encoder and a decoder"
    if not base.can_generate() or not getattr(base, "_can_compile_fullgraph", False):
        return f"{kind} has no decoding step of fixed shapes in transformers"
    if config.get_text_config(decoder=True) is not config:
        return f"{kind} takes more than text"
    if not {"position_ids", "past_key_values"} <= arguments_of(model) or getattr(config, "alibi", False):
        return f"{kind} takes no positions"
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        return f"rows of up to {length:,} tokens do not fit into its sliding window of {window:,}"
    if {"dynamic", "longrope"} & {*_rope_types(getattr(config, "rope_parameters", None) or {})}:
        return "its rotary positions depend on the number of tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, which takes no mask; load it with 'sdpa'"
    if len({*(getattr(base, "hf_device_map", None) or {}).values()}) > 1:
        return "its weights are on several devices"
    if hasattr(next(model.parameters()), "ds_id"):
        return "its weights are sharded by DeepSpeed"
    if isinstance(model, PeftModel) and any(c.is_prompt_learning for c in model.peft_config.values()):
        return "it has virtual tokens"
    configs: Any = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(getattr(one, "alora_invocation_tokens", None) for one in configs):
        return "an adapter acts from its invocation tokens on (aLoRA)"
    if adapter_names is not None:
        if tuner is None:
            return "adapter_names are of adapters that are not this library's"
        if any(getattr(config, "modules_to_save", None) for config in model.peft_config.values()):
            return "the adapters have modules_to_save, and rows have different adapters"
    return None


def base_of(model: Any) -> Any:
    """Return the base model, which PEFT may be around."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tuner_of(model: Any) -> AdapterModel | None:
    """Return PEFT's tuner model of an adapter of this library."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdapterModel) else None


def arguments_of(model: Any) -> set[str]:
    """Return the names of a model's arguments."""
    return _arguments_of(type(base_of(model)))


@functools.cache
def _arguments_of(kind: type) -> set[str]:
    # a fused class's `forward` passes on what its own class's takes
    forwards = [vars(one)["forward"] for one in kind.__mro__ if "forward" in vars(one)]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def _rope_types(parameters: Mapping[str, Any]) -> Iterable[str]:
    """Yield the kinds of rotary positions, which may be given by the type of a layer."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif name in ("rope_type", "type"):
            yield value
