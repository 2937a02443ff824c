"""A trainer whose training loss is the fused head's: TRL's also makes entropies and hits, and waits for the GPU."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from lsr_scale import distributed
from lsr_scale.fused.attention_mask import needs_mask
from lsr_scale.fused.fallback import lm_head_fallback_reason
from lsr_scale.fused.forward_context import document_boundaries
from lsr_scale.fused.loss import IGNORE_INDEX

_Base: Any = Trainer


class HeadCollator:
    """Adds to a batch, as `head`, what the fused model would have to ask the GPU for.

    That is `known`: what is supervised and its `targets` (see `causal_lm_loss`), and where the documents begin that are
    packed in a row, by transformers' names; whether a mask is needed; and the number of `tokens`.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]]) -> None:
        """Take TRL's collator."""
        self.collator = collator

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Return a batch."""
        flat = getattr(self.collator, "padding_free", False)
        batch = self.collator(joined_rows(examples) if flat else examples)
        wanted = functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1)
        supervised = (wanted != IGNORE_INDEX).nonzero().flatten()
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        known: dict[str, Any] = {"supervised": supervised, "targets": wanted[supervised]}
        known["mask_is_needed"] = needs_mask(batch, batch["labels"])
        rows, length = batch["input_ids"].shape
        if rows == 1 and mask is None and "cu_seq_lens_q" not in batch:  # TRL tells them from 1.16 on
            boundaries, longest = document_boundaries(batch, length)
            if boundaries is None:  # one document, which is to be known too
                boundaries, longest = torch.tensor([0, length], dtype=torch.int32), length
            known |= {"cu_seq_lens_q": boundaries, "max_length_q": longest}
        return {**batch, "head": {"known": known, "tokens": tokens}}


def joined_rows(examples: Any) -> Any:
    """Return rows as one packed row, of which TRL's collator without padding makes the same batch.

    It makes several tensors of every row, which takes the host some 5 ms for 128 rows; a small model's step takes 12.

    Args:
        examples: Rows; `input_ids`, `labels` and `seq_lengths` are lists or arrays.
    """
    if len(examples) < 2 or any(one.keys() - {"input_ids", "labels", "seq_lengths"} for one in examples):
        return examples
    rows = [one for one in examples if len(one["input_ids"])]  # the array of an empty row has another dtype
    if not rows:
        return examples
    ids, labels = ([one.get(name, one["input_ids"]) for one in rows] for name in ("input_ids", "labels"))
    lengths = chain.from_iterable(one.get("seq_lengths", [len(one["input_ids"])]) for one in rows)
    return [
        {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "seq_lengths": [int(length) for length in lengths if length],
        }
    ]


class HeadLoss(_Base):
    """Goes before TRL's trainer among a class's bases; batches are `HeadCollator`'s, or all is as TRL has it.

    Evaluation stays TRL's in any case.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross-entropy of a batch's supervised tokens, in value TRL's."""
        inputs = dict(inputs)
        head = inputs.pop("head", None)
        if head is None or return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        divisor = None if num_items_in_batch is None else at_least_one(num_items_in_batch)
        loss = model(**inputs, **head["known"], use_cache=False, num_items_in_batch=divisor).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the engines divide gradients by it
        self.count_tokens(head)
        return loss

    def count_tokens(self, head: Mapping[str, Any]) -> None:
        """Add a batch's tokens to those trained on."""
        self._tokens += head["tokens"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the tokens of all processes; every process takes part."""
        if self.model.training and self._tokens > self._logged_tokens:
            self._logged_tokens = self._tokens
            self._metrics["train"]["num_tokens"] = [sum(distributed.gather([self._tokens]))]
        super().log(logs, start_time)


def at_least_one(number: Any) -> Any:
    """Return a count that can be divided by."""
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


def head_loss_fallback_reason(head: Any, training: Mapping[str, Any]) -> str | None:
    """Return why TRL must compute the loss of a fused causal language model, or None.

    Args:
        head: The model (`LlamaForCausalLM` or the like), fused.
        training: `loss_type` and `label_smoothing_factor` of its trainer.
    """
    if training["loss_type"] != "nll" or training["label_smoothing_factor"]:
        return "the loss is not plain cross-entropy"
    return lm_head_fallback_reason(head, {})
