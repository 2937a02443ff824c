"""The frozen base of a sweep: loaded once, and shared by its trials' models."""

from collections.abc import Callable
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.model import load_base_for
from lsr_scale.model.share import share_base
from lsr_scale.training.trainers import ignore_library_warnings


class Bases:
    """The base that was loaded last; trials of one model section have one.

    A classifier's head is new, drawn by the run's seed for the labels of its rows: where those differ, the base is
    loaded again.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Take who is told, in a line each, what is loaded and what a user should know of it."""
        self.say = say
        self._key: Any = None
        self._base: Any = None

    def of(self, run: RunConfig) -> Any:
        """Return the base of a run, loaded if it is not there; nothing may be injected into it.

        Raises:
            UserError: as `load_base`.
        """
        drawn = run.model.random_weights or run.model.task == "seq_cls"
        key = run.model.model_dump(), run.training["seed"] if drawn else None
        if key != self._key:
            self._key = self._base = None  # before the next one is loaded
            self.say(f"loading {run.model.name} ({run.model.quantization})")
            with ignore_library_warnings():
                self._base = load_base_for(run.model, run.training["seed"], say=lambda text: self.say(f"note: {text}"))
            self._key = key
        return self._base

    def copy(self, run: RunConfig) -> Any:
        """Return the base of a run as a model of its own over the same weights, for one adapter."""
        return share_base(self.of(run))
