"""What libraries keep for a whole process and a run counts on: kept by run, where several take turns in one."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

# each is one dictionary that all of a class's objects are views of; a trainer reads in them whether a gradient is
# complete, and whether a batch is an epoch's last
_OF_ACCELERATE: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)


@contextmanager
def short_collections() -> Iterator[None]:
    """Have the garbage collector pass over what is there now, above all imported modules, until the end.

    A trainer collects garbage as it begins, a trial's memory is freed at its end, and to look at all that torch and
    transformers bring takes a third of a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class ProcessState:
    """The states of the random number generators, and accelerate's of the trainer that is at work."""

    generators: tuple[Any, ...]
    of_accelerate: tuple[dict[str, Any], ...]

    @classmethod
    def current(cls) -> Self:
        """Return the state that the process has now."""
        generators = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), None
        if torch.cuda.is_available():
            generators = (*generators[:3], torch.cuda.get_rng_state())
        return cls(generators, tuple(dict(one._shared_state) for one in _OF_ACCELERATE))

    def of_new_trainer(self) -> Self:
        """Return this state, but of a trainer that has seen no batch."""
        return type(self)(self.generators, (*self.of_accelerate[:2], {}))

    def restore(self) -> None:
        """Give the process this state."""
        of_python, of_numpy, of_torch, of_cuda = self.generators
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda is not None:
            torch.cuda.set_rng_state(of_cuda)
        for one, values in zip(_OF_ACCELERATE, self.of_accelerate, strict=True):
            one._shared_state.clear()
            one._shared_state.update(values)
