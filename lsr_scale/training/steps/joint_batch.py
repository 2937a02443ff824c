"""One batch of several trials' batches: rows sorted by trial, and as many tokens of each, padding included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.errors import UserError
from lsr_scale.fused.forward_context import document_boundaries
from lsr_scale.fused.loss import IGNORE_INDEX

# what a model takes by token, and what stands there on padding
_PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}
# read elsewhere, or made anew: the boundaries of packed documents, and what collators know of one trial's batch
_NOT_COPIED = {"labels", "head", "static", "use_cache", "seq_idx"}
_NOT_COPIED |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


@dataclass(frozen=True)
class JointBatch:
    """A batch of the joint model.

    Attributes:
        inputs: The model's keyword arguments: padded rows `[n B, S]` with their mask; packed rows `[n, T]`, or `[1, n
            T]` with the boundaries of all documents.
        supervised: `[N]`, the positions among all tokens that predict a label, sorted by trial.
        targets: `[N]`, the labels.
        counts: How many of those are each trial's.
        tokens: Of each trial.
        mask_is_needed: Whether the mask masks more than right padding; None where no collator knew.
    """

    inputs: dict[str, Any]
    supervised: Tensor
    targets: Tensor
    counts: list[int]
    tokens: int
    mask_is_needed: bool | None


def joint_batch(batches: Sequence[Mapping[str, Any]], flat: bool = False) -> JointBatch:
    """Return one batch of the trials' batches.

    Args:
        batches: As TRL's collator makes them, with or without what `HeadCollator` and `PackedCollator` add: all of
            padded rows, of any length and number, or all of a packed row with its `position_ids`.
        flat: Put packed rows one after the other, with the boundaries of their documents (transformers' names), which
            attention kernels for documents of different lengths read. Else they are stacked.

    Raises:
        UserError: for batches of both kinds, or with inputs that have no joint form.
    """
    packed = {_is_packed(batch) for batch in batches}
    if len(packed) > 1:
        raise UserError("trials that share a step have all packed rows, or none: set training.packing alike")
    for batch in batches:
        if unknown := sorted(set(batch) - set(_PADDING) - _NOT_COPIED):
            raise UserError(f"a shared step does not take {', '.join(unknown)} of a batch; train alone")
    rows = max(len(batch["input_ids"]) for batch in batches)
    length = max(batch["input_ids"].shape[1] for batch in batches)
    inputs: dict[str, Any] = _packed(batches, length, flat) if packed == {True} else _padded(batches, rows, length)
    supervised: list[Tensor] = []
    targets: list[Tensor] = []
    for trial, batch in enumerate(batches):
        places, labels = _supervised(batch)
        # where the tokens of shorter rows are among the longest
        own = batch["input_ids"].shape[1]
        row, column = places.div(own, rounding_mode="floor"), places % own
        supervised.append((trial * rows + row) * length + column)
        targets.append(labels)
    needed = [batch.get("head", {}).get("known", {}).get("mask_is_needed") for batch in batches]
    return JointBatch(
        inputs=inputs,
        supervised=torch.cat(supervised),
        targets=torch.cat(targets),
        counts=[len(places) for places in supervised],
        tokens=rows * length,
        mask_is_needed=None if None in needed else any(needed),
    )


def _is_packed(batch: Mapping[str, Any]) -> bool:
    return "attention_mask" not in batch and "position_ids" in batch


def _supervised(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the positions among a batch's tokens that predict a label, and the labels."""
    known = batch.get("head", {}).get("known")
    if known is not None:
        return known["supervised"], known["targets"]
    wanted = functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1)
    places = (wanted != IGNORE_INDEX).nonzero().flatten()
    return places, wanted[places]


def _padded(batches: Sequence[Mapping[str, Any]], rows: int, length: int) -> dict[str, Any]:
    """Return padded rows `[n B, S]`; what is missing of a trial's rows is padding that attends to itself."""
    names = [name for name in _PADDING if any(name in batch for batch in batches)]
    shapes = {batch["input_ids"].shape for batch in batches}
    if len(shapes) > 1 and "attention_mask" not in names:
        names.append("attention_mask")
    inputs = {}
    for name in names:
        parts = []
        for batch in batches:
            ids = batch["input_ids"]
            part = batch.get(name)
            if part is None:
                if name != "attention_mask":
                    raise UserError(f"trials that share a step have all {name} in their batches, or none; train alone")
                part = torch.ones_like(ids)
            part = functional.pad(part, (0, length - ids.shape[1]), value=_PADDING[name])
            # of a row that is masked altogether no softmax is a number
            missing = 1 if name == "attention_mask" else _PADDING[name]
            parts.append(functional.pad(part, (0, 0, 0, rows - len(ids)), value=missing))
        inputs[name] = torch.cat(parts)
    return inputs


def _packed(batches: Sequence[Mapping[str, Any]], length: int, flat: bool) -> dict[str, Any]:
    """Return packed rows, those that are shorter filled up with documents of their own."""
    boundaries = [_boundaries(batch) for batch in batches] if flat else []
    # attention takes no longer for documents no longer than others
    period = max((longest for _, longest in boundaries), default=length)
    ids, positions = [], []
    for batch in batches:
        added = length - batch["input_ids"].shape[1]
        ids.append(functional.pad(batch["input_ids"], (0, added), value=_PADDING["input_ids"]))
        extra = torch.arange(added, device=batch["position_ids"].device) % period
        positions.append(torch.cat([batch["position_ids"], extra[None]], dim=1))
    inputs: dict[str, Any] = {"input_ids": torch.cat(ids), "position_ids": torch.cat(positions)}
    if flat:
        inputs = {name: value.view(1, -1) for name, value in inputs.items()}
        bounds = []
        for trial, (of_trial, _) in enumerate(boundaries):
            own = batches[trial]["input_ids"].shape[1]
            bounds += [of_trial[:-1], torch.arange(own, length, period, dtype=torch.int32, device=of_trial.device)]
            bounds[-2:] = [part + trial * length for part in bounds[-2:]]
        bounds.append(bounds[0].new_tensor([len(batches) * length]))
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.cat(bounds))
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), period)
    return inputs


def _boundaries(batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return the boundaries of a packed row's documents, int32, and the longest's length."""
    length = batch["input_ids"].shape[1]
    known = {**batch, **batch.get("head", {}).get("known", {})}
    bounds, longest = document_boundaries(known, length)
    if bounds is None:  # one document
        return torch.tensor([0, length], dtype=torch.int32, device=batch["input_ids"].device), length
    return bounds, longest
