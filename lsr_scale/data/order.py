"""The order of a training run's rows: the same whatever number of processes share each step."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class WholeSteps(Sampler[int]):
    """An epoch's rows in steps of equal size; what the last step lacks is taken from the epoch's beginning.

    Otherwise the engine fills it, or does not, by the number of processes: training would depend on that, and no
    checkpoint could be resumed with another number.
    """

    def __init__(self, order: Sampler[int], rows_per_step: int, seed: int, drop_last: bool = False) -> None:
        """Wrap an order.

        Args:
            order: transformers' sampler. A random one becomes accelerate's, whose order is a matter of seed and epoch;
                one that groups by length groups within so many rows that a step always has whole groups.
            rows_per_step: Over all processes and micro-batches.
            seed: Of the order.
            drop_last: Leave out an incomplete step in place of filling it, if there is a whole one.
        """
        self.seed, self.epoch = seed, 0
        if isinstance(order, LengthGroupedSampler):
            order.batch_size = rows_per_step
            order.generator = self.generator = torch.Generator()
        elif isinstance(order, RandomSampler):
            order = SeedableRandomSampler(order.data_source, data_seed=seed)
        self.order = order
        number = len(order)  # pyright: ignore[reportArgumentType]
        steps = number // rows_per_step if drop_last and number >= rows_per_step else -(-number // rows_per_step)
        self.num_rows = steps * rows_per_step

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows, repeated ones included."""
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of an epoch's rows."""
        if isinstance(self.order, SeedableRandomSampler):
            self.order.set_epoch(self.epoch)
        elif isinstance(self.order, LengthGroupedSampler):
            self.generator.manual_seed(self.seed + self.epoch)
        return itertools.islice(itertools.cycle(list(self.order)), self.num_rows)


class PromptOrder(Sampler[int]):
    """The order of TRL's `RepeatSampler`, of an epoch by its number.

    TRL's goes on with a generator from epoch to epoch: in a new process, which a run resumes in, any epoch would have
    the first one's order.
    """

    def __init__(self, order: Any) -> None:
        """Wrap TRL's sampler, none of whose epochs has begun."""
        self.order, self.epoch = order, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows, repeated ones included."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of an epoch's rows."""
        if self.order.shuffle:
            self.order.generator.manual_seed(self.order.seed)
            for _ in range(self.epoch):  # what TRL's draws for the epochs before
                torch.randperm(self.order.num_samples, generator=self.order.generator)
        yield from self.order
