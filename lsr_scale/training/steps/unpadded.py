"""Batches of padded rows as one row of their tokens: no time goes into padding, nor twice into a shared prefix.

The tokens of all rows stand one after another, with the boundaries of rows as those of packed documents. Chosen and
rejected completions have one prompt, GRPO's eight or more; the tokens of a prefix that rows share are there once, and
the others attend to them (`kernels.attention.SharedPrefixes`). Every token's output is what it was, but for rounding,
and but for dropout, which is drawn once for tokens that are there once.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.fused.attention_mask import has_tokens_behind_padding
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.fused.modules import FusedDecoder
from lsr_scale.kernels.attention import SharedPrefixes

# tokens are made a multiple of it by a document more: kernels and GEMMs of other numbers are others
MULTIPLE = 64
# Least share of the tokens that shared prefixes must save: keys and values are gathered for it, their gradients
# summed, and whole rows of one length lose the faster attention (benchmarks/LOG.md).
LEAST_SAVED = 0.08


@dataclass(frozen=True)
class Rows:
    """What is known of a batch `[B, S]` of padded rows, of which T tokens are computed, and N predict a label.

    Attributes:
        tokens: `[T]`, their places among the B S; None where all are computed as they are.
        positions: `[T]`, their positions in their rows.
        documents: What a fused decoder takes of where rows begin among the tokens; of `tokens`.
        predicting: `[N]`, the places among what is computed, T tokens or B S, that predict a label.
        targets: `[N]`, the labels.
        mask: `[B, S - 1]`, true where a place predicts a label.
        mask_is_needed: Whether the attention mask masks more than right padding; of rows that stay padded.
    """

    tokens: Tensor | None
    predicting: Tensor
    targets: Tensor
    mask: Tensor
    mask_is_needed: bool
    positions: Tensor | None = None
    documents: dict[str, Any] = field(default_factory=dict)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Return the arguments of a fused decoder."""
        if self.tokens is None or self.positions is None:
            known = {} if attention_mask is None else {"mask_is_needed": self.mask_is_needed}
            return {"input_ids": input_ids, "attention_mask": attention_mask, **known}
        taken = input_ids.flatten().index_select(0, self.tokens)
        return {"input_ids": taken[None], "position_ids": self.positions[None], **self.documents}


def reads_documents(decoder: Any) -> bool:
    """Tell whether a decoder's attention computes documents by themselves: elsewhere it would be all tokens squared."""
    weight = decoder.get_input_embeddings().weight
    is_half = weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return isinstance(decoder, FusedDecoder) and weight.is_cuda and is_half


def shares_prefixes(decoder: Any) -> bool:
    """Tell whether all layers of a decoder attend to shared prefixes, also one that runs unfused.

    That one has a mask of a fused decoder with "sdpa" alone; elsewhere it attends to a document's own tokens, or reads
    keys that are not there.
    """
    return decoder.config._attn_implementation == "sdpa"


def rows_of(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, unpads: bool, shares: bool = True
) -> Rows:
    """Return what is known of a batch, which is looked at on the host: on a GPU that waits for it once.

    Args:
        input_ids: `[B, S]`.
        attention_mask: `[B, S]`, 0 on padding, left or right; None: there is none.
        labels: `[B, S]`, `IGNORE_INDEX` where they are ignored; a place predicts the next one's.
        unpads: Leave padding out, unless a label stands behind padding, which then predicts it.
        shares: Compute shared prefixes once where padding is left out.
    """
    device = labels.device
    given = torch.ones_like(labels) if attention_mask is None else attention_mask.to(labels)
    ids, mask, labels = torch.stack((input_ids.to(labels), given, labels)).cpu()
    kept = mask != 0
    wanted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    supervised = wanted != IGNORE_INDEX
    known: dict[str, Any] = {"targets": wanted[supervised], "mask": supervised[:, :-1]}
    is_full, predicts_from_padding = bool(kept.all()), bool((supervised & ~kept).any())
    is_packed = unpads and bool(kept.any()) and not predicts_from_padding and (shares or not is_full)
    packed = _packed(ids.numpy(), kept.numpy(), shares) if is_packed else None
    if packed is None or (is_full and packed.shared == 0):
        # without a mask, outputs at padding are others: it stays where labels stand on padding or behind it
        needed = not is_full and (predicts_from_padding or bool(has_tokens_behind_padding(~kept)))
        known["predicting"] = supervised.flatten().nonzero().flatten()
        return Rows(tokens=None, mask_is_needed=needed, **_to(device, known))
    known["predicting"] = torch.from_numpy(packed.place_of)[supervised]
    known |= {"tokens": packed.tokens, "positions": packed.positions}
    bounds = _to(device, {"q": packed.query_bounds, "k": packed.key_bounds, "places": packed.key_places})
    longest = [int(np.diff(one).max()) for one in (packed.query_bounds, packed.key_bounds)]
    documents: dict[str, Any] = {"cu_seq_lens_q": bounds["q"], "max_length_q": longest[0]}
    documents |= {"cu_seq_lens_k": bounds["k"], "max_length_k": longest[1]}
    if packed.shared:
        documents["shared_prefixes"] = SharedPrefixes(bounds["places"], bounds["k"], longest[1])
    return Rows(mask_is_needed=False, documents=documents, **_to(device, known))


@dataclass(frozen=True)
class _Packed:
    """The tokens of padded rows one after another.

    Attributes:
        tokens: `[T]`, their places among the B S.
        positions: `[T]`, their positions in their rows.
        query_bounds: int32 `[documents + 1]`, of the rows among the tokens.
        key_bounds: int32 `[documents + 1]`, of the rows with the prefixes that they share with others.
        key_places: `[E]`, the tokens of the latter.
        place_of: `[B, S]`, where among the tokens each place is; 0 on padding.
        shared: How many tokens are computed once instead of again.
    """

    tokens: np.ndarray
    positions: np.ndarray
    query_bounds: np.ndarray
    key_bounds: np.ndarray
    key_places: np.ndarray
    place_of: np.ndarray
    shared: int


def _packed(ids: np.ndarray, kept: np.ndarray, shares: bool) -> _Packed:
    """Return the tokens of padded rows, their longest shared prefixes there once if that saves enough."""
    columns = [np.flatnonzero(row) for row in kept]
    positions = [row - row[:1] for row in columns]
    shared = dict.fromkeys(range(len(ids)), 0)
    if shares:
        # what must be alike in a shared prefix
        alike = [np.stack((of_row[row], at), 1) for of_row, row, at in zip(ids, columns, positions, strict=True)]
        found = _shared_with_the_one_before(alike)
        if sum(found.values()) >= LEAST_SAVED * sum(map(len, columns)):
            shared = found
    order = list(shared)
    places: dict[int, np.ndarray] = {}
    begin, before = 0, np.empty(0, np.int64)
    for row in order:
        own = len(columns[row]) - shared[row]
        before = places[row] = np.concatenate((before[: shared[row]], np.arange(begin, begin + own)))
        begin += own
    place_of = np.zeros(ids.shape, np.int64)
    for row, own in places.items():
        place_of[row, columns[row]] = own
    tokens = [row * ids.shape[1] + columns[row][shared[row] :] for row in order]
    new_positions = [positions[row][shared[row] :] for row in order]
    of_keys = [places[row] for row in order]
    if added := -begin % MULTIPLE:
        tokens.append(np.zeros(added, np.int64))
        new_positions.append(np.arange(added))
        of_keys.append(np.arange(begin, begin + added))
    return _Packed(
        *(np.concatenate(parts) for parts in (tokens, new_positions)),
        *(_bounds_of(parts) for parts in (tokens, of_keys)),
        key_places=np.concatenate(of_keys),
        place_of=place_of,
        shared=sum(shared.values()),
    )


def _shared_with_the_one_before(rows: list[np.ndarray]) -> dict[int, int]:
    """Return how long a prefix each row shares with the one before it, in an order in which none could be longer."""
    # in the order of bytes rows that share a prefix are neighbours
    keys = [row.astype(">i8").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    shared = dict.fromkeys(order, 0)
    for before, row in itertools.pairwise(order):
        shared[row] = _shared_prefix(rows[before], rows[row])
    return shared


def _shared_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the prefix that two rows share, less than all of the second."""
    least = max(0, min(len(one), len(other) - 1))
    differ = (one[:least] != other[:least]).any(1)
    return int(differ.argmax()) if differ.any() else least


def _bounds_of(parts: list[np.ndarray]) -> np.ndarray:
    """Return where parts begin and end one after another; those that are empty are left out."""
    lengths = [len(part) for part in parts if len(part)]
    return np.cumsum([0, *lengths]).astype(np.int32)


def _to(device: torch.device, values: dict[str, Any]) -> dict[str, Any]:
    """Return tensors on a device, copied without waiting for it."""
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    if device.type == "cuda":
        return {name: one.contiguous().pin_memory().to(device, non_blocking=True) for name, one in tensors.items()}
    return tensors


class KnownRows:
    """`rows_of` the last two batches: the reference's pass over a batch, and KTO's over its KL's, ask again."""

    def __init__(self) -> None:
        self._last: list[tuple[tuple[Any, ...], Rows]] = []

    def of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        unpads: bool,
        shares: bool = True,
    ) -> Rows:
        """Return what `rows_of` does, without a wait where the same tensors were given."""
        key = (input_ids, attention_mask, labels, unpads, shares)
        given = [one for one in (input_ids, attention_mask, labels) if one is not None]
        if any(one.is_inference() for one in given):  # of those nobody knows whether they were written to
            return rows_of(*key)
        versions = tuple(one._version for one in given)
        for (*known, seen), rows in self._last:
            if seen == versions and all(one is other for one, other in zip(known, key, strict=True)):
                return rows
        rows = rows_of(*key)
        self._last = [*self._last[-1:], ((*key, versions), rows)]
        return rows
