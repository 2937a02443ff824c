"""The fused classes of a model's modules: decoder layer, decoder, causal language model, adapted linear.

`fuse` replaces a module's class by a subclass of its own class and one of these (see `patching`). A layer decides at
every forward whether it runs fused (see `fallback`).
"""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsr_scale.adapters.pairs import AdapterBlocks, Pair
from lsr_scale.fused.attention_mask import needs_mask
from lsr_scale.fused.decoder_layer import DecoderLayerFunction
from lsr_scale.fused.eight_bit_group import EightBitState
from lsr_scale.fused.fallback import FallbackCheck, call_fallback_reason, lm_head_fallback_reason
from lsr_scale.fused.forward_context import ForwardContext, document_boundaries, layer_positions, packed_mask
from lsr_scale.fused.layer_state import LayerSizes, Recompute
from lsr_scale.fused.linear import LinearMixin
from lsr_scale.fused.linear_groups import CachedMatrix
from lsr_scale.fused.loss import causal_lm_loss
from lsr_scale.fused.subclass import Fused
from lsr_scale.kernels.attention import SharedPrefixes

logger = logging.getLogger(__name__)


class FusedLayer(Fused):
    """A decoder layer that runs as one autograd function where it can.

    Attributes:
        recompute: What its backward pass recomputes.
        sizes: What it saves per token and what its weights take; known after the first forward.
        weight_cache: Its dequantized matrices that stay in memory from pass to pass, by the group's name.
        eight_bit: Its groups of linears that compute in 8 bits in training, by name, with what they keep for it.
        fallback_check: The last answer of `layer_fallback_reason`.
        warned: The reason to fall back that was logged last.
    """

    recompute: Recompute = "none"
    sizes: LayerSizes | None = None
    weight_cache: Mapping[str, CachedMatrix] = MappingProxyType({})
    eight_bit: Mapping[str, EightBitState] = MappingProxyType({})
    fallback_check: FallbackCheck | None = None
    warned: str | None = None

    def forward(
        self, hidden_states: Tensor, *args: Any, fused_context: ForwardContext | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the layer: fused, or as its own class does if `fallback` has a reason."""
        module: Any = self
        context = fused_context
        if context is None or args:
            reason = "called by other than its model"
        else:
            reason = context.reason(module) or call_fallback_reason(module, hidden_states, kwargs)
        if reason:
            if reason != self.warned and module.training:
                logger.warning("%s %s runs unfused: %s", self.original.__name__, module.self_attn.layer_idx, reason)
                self.warned = reason
            if (
                context is not None
                and context.mask_placeholder is not None
                and kwargs.get("attention_mask") is not None
            ):
                kwargs["attention_mask"] = packed_mask(module, hidden_states, context)
            run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
            if self.recompute == "none" or not (module.training and torch.is_grad_enabled()):
                return run(hidden_states, *args, **kwargs)
            # recomputation was asked for, so the unfused layer is checkpointed
            return checkpoint(run, hidden_states, *args, use_reentrant=False, **kwargs)  # pyright: ignore
        assert context is not None
        positions = layer_positions(module, hidden_states, context, kwargs)
        return DecoderLayerFunction.apply(hidden_states, self, positions, self.recompute, *context.pairs(module))  # pyright: ignore


class FusedDecoder(Fused):
    """The model around the decoder layers (`LlamaModel`): makes their `ForwardContext`, once for all of them."""

    pair_cache: dict[Any, tuple[Any, dict[int, Pair]]] | None = None
    joint_blocks: dict[Any, AdapterBlocks] | None = None  # of linears that several trials adapt
    max_tokens: int = 0  # the most in one training forward so far
    mask_is_needed: bool | None = None  # None: not known

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; drops cached pairs, as DeepSpeed may write factors in place."""
        self.pair_cache = None
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        *args: Any,
        mask_is_needed: bool | None = None,
        shared_prefixes: SharedPrefixes | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model. In training there is no key/value cache, whatever `use_cache` says: nothing would read it.

        Nor is there an attention mask in training that is not needed, which is found out by `needs_mask` unless
        `mask_is_needed` says so. With boundaries of packed documents there may be `shared_prefixes`, those that
        these share.
        """
        module: Any = self
        if module.training or torch.is_grad_enabled():
            self.pair_cache = None
        if module.training and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        context = ForwardContext(self)
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if module.training and isinstance(tokens, Tensor):
            self.max_tokens = max(self.max_tokens, tokens.shape[:2].numel())
        no_mask_or_cache = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
        if len(args) < 2 and no_mask_or_cache and isinstance(tokens, Tensor):
            rows, length = tokens.shape[:2]
            context.cu_seqlens, context.max_seqlen = document_boundaries(kwargs, length, rows)
            context.shared = shared_prefixes
            cached = module.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
            if context.cu_seqlens is not None and module.config._attn_implementation == "sdpa" and not cached:
                # four dimensions: transformers passes it on as it is
                context.mask_placeholder = kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=tokens.device)
        if len(args) < 2 and module.training and context.cu_seqlens is None:
            known = self.mask_is_needed if mask_is_needed is None else mask_is_needed
            needed = needs_mask(kwargs) if known is None else known
            kwargs["attention_mask"] = kwargs.get("attention_mask") if needed else None
        others = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        context.causal_only = len(args) < 2 and all(other is None for other in others)
        return super().forward(*args, fused_context=context, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class FusedLinear(LinearMixin, Fused):
    """An adapted linear layer with the fused operations."""


class FusedCausalLM(Fused):
    """A causal language model whose training loss is computed chunk by chunk, without all logits in memory."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model; in training with labels, `logits` is None in what is returned."""
        module: Any = self
        needed = kwargs.pop("mask_is_needed", None)
        if labels is not None and module.training and not args and needed is None:
            needed = needs_mask(kwargs, labels)
        if labels is None or not module.training or args or lm_head_fallback_reason(module, kwargs):
            module.model.mask_is_needed = needed  # no keyword argument: a user's loss function would get it
            try:
                return super().forward(*args, labels=labels, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                module.model.mask_is_needed = None
        return causal_lm_loss(module, labels, mask_is_needed=needed, **kwargs)
