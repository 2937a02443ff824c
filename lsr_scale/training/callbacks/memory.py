"""`training.memory: auto`: after a run's first step its fused layers keep what fits on the GPU."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.fused import fit_memory, release_weights

# Of a GPU's memory, what is never given away: the allocator's fragments, libraries that load late, a driver's needs.
MARGIN = 0.08


class KeepWhatFits(TrainerCallback):
    """Takes the first step as the thriftiest one, then spends on speed what it left free.

    The first step computes everything again in the backward pass (`fuse(recompute="full")`). Its peak, scaled from the
    most tokens that it had at once to the most that any step can have, is what every later step takes at least; what
    is left beyond it and a margin goes to `fit_memory`. So a run fits wherever it fits with `memory: save`. All
    processes take the smallest of their shares, and so choose alike.
    """

    def __init__(self, largest: int | None, say: Callable[[str], None], gpu: Any = torch.cuda) -> None:
        """Take the policy's facts.

        Args:
            largest: The most tokens that one forward pass can have; None if nobody knows: then nothing is changed.
            say: Told what was chosen.
            gpu: What tells the memory of this process's GPU, as torch.cuda does.
        """
        self.largest = largest
        self.say = say
        self.gpu = gpu
        self.decided = largest is None
        self.rest = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note what lies in memory before the first step."""
        self.rest = self.gpu.memory_allocated()
        self.gpu.reset_peak_memory_stats()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide, once."""
        if self.decided:
            return
        self.decided = True
        model = kwargs["model"]
        spare = min(distributed.gather([self._spare(model)]))
        report = fit_memory(model, spare, self.largest or 0)
        if report is not None:
            self.say(str(report))
        self.gpu.empty_cache()  # blocks of the first step's sizes

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give back what the weights took: accuracy is measured next."""
        release_weights(kwargs["model"])

    def _spare(self, model: Any) -> float:
        """Return the bytes that no step with everything recomputed will touch on this GPU; negative if it is tight."""
        seen = max((getattr(module, "most_tokens", 0) for module in model.modules()), default=0)
        if not seen:
            return 0.0
        growth = max(1.0, (self.largest or 0) / seen)
        # the optimizer's state has come into being at the end of the step
        peak = self.gpu.memory_allocated() + (self.gpu.max_memory_allocated() - self.rest) * growth
        free, total = self.gpu.mem_get_info()
        return free + self.gpu.memory_reserved() - MARGIN * total - peak


def largest_forward(trainer: Trainer) -> int | None:
    """Return the most tokens, padding included, that one forward pass of a trainer can have, None if unknown."""
    longest = row_lengths(trainer)[0]
    return None if longest is None else longest * trainer.args.per_device_train_batch_size


def row_lengths(trainer: Trainer) -> tuple[int | None, float | None]:
    """Return the tokens of the longest training row of a trainer, and of the mean one; None if unknown."""
    rows: Any = trainer.train_dataset
    limit = getattr(trainer.args, "max_length", None)
    if "input_ids" not in (getattr(rows, "column_names", None) or ()):
        return limit, limit
    import pyarrow.compute as arrow

    lengths: Any = arrow.list_value_length(rows.data.column("input_ids"))  # pyright: ignore[reportAttributeAccessIssue]
    longest, mean = (getattr(arrow, name)(lengths).as_py() or 0 for name in ("max", "mean"))
    return longest if limit is None else min(longest, limit), mean
