"""A decoding step of LLaMA, Mistral, Qwen2 and Qwen3 by few kernels: one each for norms, rotary positions, attention.

    h = x + o(attention(rot(norm_q(q(n))), rot(norm_k(k(n))), v(n))),  n = norm_1(x)
    y = h + down(silu(gate(m)) up(m)),                                 m = norm_2(h)

Linear layers are called as they are, so whatever is in their places acts: adapters, one a row, quantized weights. The
rest is `lsr_scale.kernels`, which round once where transformers' layers do at each operation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from lsr_scale.fused.fallback import CAUSAL_LMS, DECODER_LAYERS, FAMILIES, skipped_reason
from lsr_scale.fused.subclass import original_class
from lsr_scale.generation.fallback import base_of
from lsr_scale.kernels.decode_attention import decode_attention
from lsr_scale.kernels.rms_norm import rms_norm
from lsr_scale.kernels.rotary import rotate


def step_fallback_reason(model: Any) -> str | None:
    """Return why the steps of a causal language model, which PEFT may be around, must be transformers' own, or None."""
    base = base_of(model)
    kind = original_class(base)
    if kind not in CAUSAL_LMS:
        return f"{kind.__name__} is none of {', '.join(FAMILIES)}"
    module, name = CAUSAL_LMS[kind]
    norm = getattr(module, f"{name}RMSNorm")
    inside: list[nn.Module] = [base.model, base.model.norm]
    if type(base.model.norm) is not norm:
        return f"the last norm is a {type(base.model.norm).__name__}"
    for layer in base.model.layers:
        parts = DECODER_LAYERS.get(original_class(layer), {})
        others = [part for part, expected in parts.items() if type(getattr(layer, part)) is not expected]
        if not parts or others:
            return f"a layer's {', '.join(others) or 'class'} is not {name}'s"
        if not isinstance(layer.mlp.act_fn, SiLUActivation | nn.SiLU):
            return f"the activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
        of_heads = [getattr(layer.self_attn, part) for part in ("q_norm", "k_norm") if hasattr(layer.self_attn, part)]
        if any(type(one) is not norm for one in of_heads):
            return f"a norm of heads is not {name}'s"
        inside += [layer, layer.mlp.act_fn, *of_heads, *(getattr(layer, part) for part in parts)]
    # which nothing would call
    outside = {id(one): one for one in ((model, model.base_model, base) if base is not model else (base,))}
    for one in outside.values():
        if reason := skipped_reason(type(one).__name__, one, _has_forward_of_others(one)):
            return reason
    return next((reason for one in inside if (reason := skipped_reason(type(one).__name__, one))), None)


def _has_forward_of_others(module: nn.Module) -> bool:
    """Tell whether a model has a forward of its own that changes the logits, for all that is known of it.

    Trainers give it one: TRL and this library for log-probabilities, accelerate for its autocast.
    """
    forward = vars(module).get("forward")
    names = getattr(getattr(forward, "__func__", forward), "__globals__", {})
    return forward is not None and names.get("__name__", "").partition(".")[0] not in ("trl", "lsr_scale", "accelerate")


def step_logits(base: Any, tokens: Tensor, positions: Tensor, cache: Sequence[Any], first: Tensor) -> Tensor:
    """Return the logits of the next tokens, `[B, vocabulary]`, and write the new keys and values into the cache.

    Args:
        base: The causal language model of transformers; `step_fallback_reason` has none.
        tokens: `[B, 1]`.
        positions: `[B, 1]`.
        cache: A `FixedLayer` for each layer.
        first: `[B]`, where a row's tokens begin in the cache.
    """
    model = base.model
    x = model.embed_tokens(tokens)
    cos, sin = (table.flatten(0, 1) for table in model.rotary_emb(x, positions))
    x = x.flatten(0, 1)
    update: Tensor | None = None
    for layer, memory in zip(model.layers, cache, strict=True):
        normed, x = _normed(layer.input_layernorm, x, update)
        update = _attended(layer.self_attn, normed, cos, sin, memory, first)
        normed, x = _normed(layer.post_attention_layernorm, x, update)
        mlp, normed = layer.mlp, normed[:, None]
        inner = functional.silu(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed))
        update = mlp.down_proj(inner)[:, 0]
    normed, _ = _normed(model.norm, x, update)
    return base.lm_head(normed)


def _normed(norm: Any, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the norm of `x + update`, and that sum."""
    out = torch.empty_like(x)
    if update is None:
        rms_norm(x, norm.weight, norm.variance_epsilon, out)
        return out, x
    total = torch.empty_like(x)
    rms_norm(update.to(x.dtype), norm.weight, norm.variance_epsilon, out, residual=x, residual_out=total)
    return out, total


def _attended(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor, memory: Any, first: Tensor) -> Tensor:
    """Return the output of o_proj, `[B, N]`."""
    rows, size = normed[:, None], attention.head_dim
    q, k, v = (
        project(rows).unflatten(-1, (-1, size)).flatten(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    # not in place: a linear's hooks may have kept its output
    q, k = (_rotated(heads, getattr(attention, norm, None), cos, sin) for heads, norm in ((q, "q_norm"), (k, "k_norm")))
    keys, values = memory.update(k[:, :, None], v[:, :, None])
    out = decode_attention(q.to(keys.dtype), keys, values, first, memory.place, attention.scaling)
    return attention.o_proj(out.flatten(1)[:, None])[:, 0]


def _rotated(heads: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads `[B, H, D]` at their rows' positions, normed before if there is a norm."""
    out = torch.empty_like(heads)
    if norm is not None:
        rms_norm(heads, norm.weight, norm.variance_epsilon, out)
    rotate(heads if norm is None else out, cos, sin, out)
    return out
