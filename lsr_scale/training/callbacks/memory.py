"""`training.memory: auto`: from the second step on fused layers save and cache as much as fits on the GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.fused import clear_weight_cache, fit_memory
from lsr_scale.fused.memory import MARGIN


class FreeMemory:
    """What is free on a GPU beside the steps of a fused model, from what its first one took."""

    def __init__(self, gpu: Any = torch.cuda) -> None:
        """Begin before the first step; `gpu` has the memory statistics, in torch.cuda's functions."""
        self.gpu = gpu
        self.allocated_before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()

    def after_step(self, model: Any, max_tokens: int) -> float:
        """Return the bytes that no step with full recomputation takes; negative if not even it fits.

        Args:
            model: The model, whose layers recomputed everything so far.
            max_tokens: The most tokens that one forward pass can have.
        """
        seen = max((getattr(module, "max_tokens", 0) for module in model.modules()), default=0)
        if not seen:
            return 0.0
        growth = max(1.0, max_tokens / seen)
        # at the end of the step the optimizer's state is allocated
        peak = self.gpu.memory_allocated() + (self.gpu.max_memory_allocated() - self.allocated_before) * growth
        free, total = self.gpu.mem_get_info()
        return free + self.gpu.memory_reserved() - MARGIN * total - peak


class FitMemoryCallback(TrainerCallback):
    """Takes the first step with full recomputation, then gives the memory that it left free to `fit_memory`.

    The first step recomputes everything in the backward pass (`fuse(recompute="full")`). Its peak, scaled from the most
    tokens that it had at once to the most that any step can have, is the least that every later step takes; what is
    free beyond it and a margin goes to `fit_memory`. So a run fits wherever it fits with `memory: save`. All processes
    take the smallest of their free memories, and so choose alike.
    """

    def __init__(self, max_tokens: int | None, say: Callable[[str], None], gpu: Any = torch.cuda) -> None:
        """Take what the choice depends on.

        Args:
            max_tokens: The most tokens that one forward pass can have; None if unknown: then nothing is changed.
            say: Called with what was chosen, in a line.
            gpu: Memory statistics of this process's GPU, in torch.cuda's functions.
        """
        self.max_tokens = max_tokens
        self.say = say
        self.gpu = gpu
        self.decided = max_tokens is None
        self.free: FreeMemory | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note what is allocated before the first step."""
        self.free = FreeMemory(self.gpu)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide, once."""
        if self.decided or self.free is None:
            return
        self.decided = True
        model = kwargs["model"]
        free_bytes = min(distributed.gather([self.free.after_step(model, self.max_tokens or 0)]))
        report = fit_memory(model, free_bytes, self.max_tokens or 0)
        if report is not None:
            self.say(str(report))
        self.gpu.empty_cache()  # frees cached blocks of the first step's sizes

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Free the cached weights: evaluation comes next."""
        clear_weight_cache(kwargs["model"])


def max_forward_tokens(trainer: Trainer, sequences: int = 1) -> int | None:
    """Return the most tokens, padding included, that one forward pass of a trainer can have, None if unknown.

    That is as many of its longest rows as a batch has where they are joined (`padding_free`), and where they are padded
    so many times its longest one: a batch of very many short rows has far fewer.

    Args:
        trainer: The trainer.
        sequences: How many a row has: chosen and rejected are two.
    """
    lengths, rows = _lengths(trainer), trainer.args.per_device_train_batch_size
    if lengths is None:
        longest = row_lengths(trainer)[0]
        return None if longest is None else longest * sequences * rows
    if not getattr(trainer, "padding_free", False):
        return int(lengths.max(initial=0)) * sequences * rows
    longest_first = np.sort(lengths)[::-1]
    # a batch of more rows than there are repeats them (`WholeSteps`)
    tokens, multiple = int(np.resize(longest_first, rows).sum()), getattr(trainer.args, "pad_to_multiple_of", None) or 1
    return -(-tokens // multiple) * multiple


# TRL's columns of what is behind a prompt; KTO's KL has another row's completion there
COMPLETIONS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


def row_lengths(trainer: Trainer) -> tuple[int | None, float | None]:
    """Return the tokens of the longest training row of a trainer, and of the mean one; None if unknown.

    Of a row with several completions that is with the longest one.
    """
    lengths = _lengths(trainer)
    if lengths is None:
        generated = getattr(trainer, "longest_row", None)  # with what it generates
        most = generated if generated is not None else getattr(trainer.args, "max_length", None)
        return most, most
    return (int(lengths.max()), float(lengths.mean())) if len(lengths) else (0, 0.0)


def _lengths(trainer: Trainer) -> np.ndarray | None:
    """Return the tokens of each training row, None where they are not to be had."""
    rows: Any = trainer.train_dataset
    names = getattr(rows, "column_names", None) or ()
    # SFT's, or ORPO's, whole; else completions behind a prompt
    whole = [name for name in ("input_ids", "chosen_input_ids", "rejected_input_ids") if name in names]
    completions = [name for name in COMPLETIONS if name in names]
    if getattr(trainer, "longest_row", None) is not None or not (whole or completions):
        return None
    import pyarrow.compute as compute

    arrow: Any = compute
    lengths = [arrow.list_value_length(rows.data.column(name)) for name in whole or completions]
    longest = lengths[0] if len(lengths) == 1 else arrow.max_element_wise(*lengths)
    if not whole:
        longest = arrow.add(longest, arrow.list_value_length(rows.data.column("prompt_ids")))
    found, limit = longest.to_numpy(), getattr(trainer.args, "max_length", None)
    return found if limit is None else np.minimum(found, limit)
