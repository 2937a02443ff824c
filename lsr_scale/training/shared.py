"""What a run has in common with other runs of its process that are under way at the same time (`sweeping.places`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from lsr_scale.config import RunConfig
from lsr_scale.scoring.scorer import EncodesOnce
from lsr_scale.training.callbacks.signals import Signals
from lsr_scale.training.steps.meeting import Meet
from lsr_scale.training.trial_rows import TrialRows
from lsr_scale.training.trial_starts import TrialStarts


@dataclass(frozen=True)
class Shared:
    """The base model, training steps and signals of runs that share a process.

    What is set for a whole process is then not the run's to set: the process group, handlers of signals, filters of
    warnings, the screen. Its pictures and its page are not drawn in between: see `report.write.show_at_end`.

    Attributes:
        base: Returns the base model of a run, for its adapter alone, such as a copy by `share_base`.
        meet: Takes part in joint training steps; None: the run's steps are its own.
        signals: What the process received; somebody else is `listening`.
        say: Told what the run would print, a line each.
        callbacks: Added to the trainer's, after all others.
        rows: Reads the rows of runs, those of equal runs once; None: each reads its own.
        starts: The starts from the gradient, computed once for equal runs; None: each computes its own.
        encode: Encodes the questions that runs are scored on.
    """

    base: Callable[[RunConfig], Any]
    meet: Meet | None = None
    signals: Signals = field(default_factory=Signals)
    say: Callable[[str], None] = lambda text: None
    callbacks: Sequence[TrainerCallback] = ()
    rows: TrialRows | None = None
    starts: TrialStarts | None = None
    encode: EncodesOnce = field(default_factory=EncodesOnce)
