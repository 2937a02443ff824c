"""Whether a batch needs an attention mask. Right padding needs none: a causal token attends to nothing after it.

Without a mask attention takes its fastest kernels, and no mask `[S, S]` is made. Outputs at the padding itself are then
others, and finite like the rest. So the mask stays where somebody may read those: outside of training, and where labels
supervise padding.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lsr_scale.fused.loss import IGNORE_INDEX


def needs_mask(arguments: Mapping[str, Any], labels: Tensor | None = None) -> bool:
    """Tell whether a forward pass's attention mask masks more than right padding.

    Args:
        arguments: The model's. A mask `[B, S]` on a GPU costs a synchronization.
        labels: `[B, S]`, `IGNORE_INDEX` where the loss ignores them; None: it ignores all padding.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        return False
    # without a mask, positions and boundaries mean packed documents
    others = (arguments.get(name) for name in ("past_key_values", "position_ids", "cu_seq_lens_q"))
    if not isinstance(mask, Tensor) or mask.dim() != 2 or any(other is not None for other in others):
        return True
    padding = mask == 0
    needed = has_tokens_behind_padding(padding)
    if labels is not None and labels.shape == mask.shape:
        needed = needed | (padding & (labels.to(mask.device) != IGNORE_INDEX)).any()
    return bool(needed)


def has_tokens_behind_padding(padding: Tensor) -> Tensor:
    """Tell, as a scalar on its device, whether `padding [B, S]` (true there) is followed by a token in any row."""
    return (padding[:, :-1] & ~padding[:, 1:]).any()
