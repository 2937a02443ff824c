"""Batches of padded rows as one row of their tokens: no time goes into padding, and attention needs no mask.

The tokens of all rows stand one after another, with the boundaries of rows as those of packed documents and the
positions that they had, so every token's output is what it was, but for rounding. Chosen and rejected completions, and
GRPO's behind their prompts, have unlike lengths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.fused.attention_mask import has_tokens_behind_padding
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.fused.modules import FusedDecoder


@dataclass(frozen=True)
class Rows:
    """What is known of a batch `[B, S]` of padded rows with T tokens, N of which predict a label.

    Attributes:
        tokens: `[T]`, their places among the B S; None where no place is padding, or none may be left out.
        documents: transformers' names for where rows begin among the tokens, and how long the longest is; of `tokens`.
        predicting: `[N]`, the places among what is computed, T tokens or B S, that predict a label.
        targets: `[N]`, the labels.
        mask: `[B, S - 1]`, true where a place predicts a label.
        mask_is_needed: Whether the attention mask masks more than right padding; of rows that stay padded.
    """

    tokens: Tensor | None
    documents: dict[str, Any]
    predicting: Tensor
    targets: Tensor
    mask: Tensor
    mask_is_needed: bool

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Return the arguments of a fused decoder."""
        if self.tokens is None:
            known = {} if attention_mask is None else {"mask_is_needed": self.mask_is_needed}
            return {"input_ids": input_ids, "attention_mask": attention_mask, **known}
        positions = self.tokens % input_ids.shape[1]
        taken = input_ids.flatten().index_select(0, self.tokens)
        return {"input_ids": taken[None], "position_ids": positions[None], **self.documents}


def reads_documents(decoder: Any) -> bool:
    """Tell whether a decoder's attention computes documents by themselves: elsewhere it would be all tokens squared."""
    weight = decoder.get_input_embeddings().weight
    is_half = weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return isinstance(decoder, FusedDecoder) and weight.is_cuda and is_half


def rows_of(attention_mask: Tensor | None, labels: Tensor, unpads: bool) -> Rows:
    """Return what is known of a batch; on a GPU the host waits for it once.

    Args:
        attention_mask: `[B, S]`, 0 on padding, left or right; None: there is none.
        labels: `[B, S]`, `IGNORE_INDEX` where they are ignored; a place predicts the next one's.
        unpads: Leave padding out, unless a label stands behind it, which then predicts it.
    """
    wanted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    supervised = wanted != IGNORE_INDEX
    kept = torch.ones_like(supervised) if attention_mask is None else attention_mask != 0
    lengths = kept.sum(1)
    facts = torch.stack(
        [kept.all(), (supervised & ~kept).any(), has_tokens_behind_padding(~kept), lengths.max()]
    ).tolist()
    is_full, predicts_from_padding, has_left_padding, longest = facts
    predicting = supervised.flatten().nonzero().flatten()
    targets = wanted.flatten().index_select(0, predicting)
    mask = supervised[:, :-1]
    if is_full or predicts_from_padding or not unpads:
        # without a mask, outputs at padding are others: it stays where labels stand on padding or behind it
        needed = not is_full and bool(has_left_padding or predicts_from_padding)
        return Rows(None, {}, predicting, targets, mask, needed)
    tokens = kept.flatten().nonzero().flatten()
    place_of = kept.flatten().cumsum(0) - 1
    bounds = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    documents: dict[str, Any] = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
    documents |= dict.fromkeys(("max_length_q", "max_length_k"), int(longest))
    return Rows(tokens, documents, place_of.index_select(0, predicting), targets, mask, False)


class KnownRows:
    """`rows_of` the last two batches: the reference's pass over a batch, and KTO's over its KL's, ask again."""

    def __init__(self) -> None:
        self._last: list[tuple[tuple[Any, ...], Rows]] = []

    def of(self, attention_mask: Tensor | None, labels: Tensor, unpads: bool) -> Rows:
        """Return what `rows_of` does, without a wait where the same tensors were given."""
        key = (attention_mask, labels, unpads)
        given = [one for one in (attention_mask, labels) if one is not None]
        if any(one.is_inference() for one in given):  # of those nobody knows whether they were written to
            return rows_of(attention_mask, labels, unpads)
        versions = tuple(one._version for one in given)
        for (*known, seen), rows in self._last:
            if seen == versions and all(one is other for one, other in zip(known, key, strict=True)):
                return rows
        rows = rows_of(attention_mask, labels, unpads)
        self._last = [*self._last[-1:], ((*key, versions), rows)]
        return rows
