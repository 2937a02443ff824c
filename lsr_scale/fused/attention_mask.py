"""Rows padded on the right need no attention mask: under causal attention no token sees what comes after it.

Without a mask attention takes its fastest kernels, and nobody makes the square of the tokens that a mask is. What is
computed at the padding itself is something else then, and finite like the rest. So the mask stays where somebody may
look there: outside of training, and where something is to be learned at padding.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lsr_scale.fused.loss import IGNORED


def needs_mask(arguments: Mapping[str, Any], labels: Tensor | None = None) -> bool:
    """Tell whether a forward pass's attention mask hides more than padding behind each row's tokens.

    Args:
        arguments: What the model is given. The host waits for a mask `[B, S]` on a GPU.
        labels: `[B, S]`, `IGNORED` where nothing is to be learned; None: nothing is at padding.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        return False
    # without a mask positions and boundaries tell of packed documents
    others = (arguments.get(name) for name in ("past_key_values", "position_ids", "cu_seq_lens_q"))
    if not isinstance(mask, Tensor) or mask.dim() != 2 or any(other is not None for other in others):
        return True
    padding = mask == 0
    needed = (padding[:, :-1] & ~padding[:, 1:]).any()
    if labels is not None and labels.shape == mask.shape:
        needed = needed | (padding & (labels.to(mask.device) != IGNORED)).any()
    return bool(needed)
