"""Successive halving: at each rung, a share of a trial's steps, the best trials of the whole sweep go on.

A trial that reaches a rung saves a checkpoint and pauses. Once all that are to reach it have, `keep` of them go on, and
the others are stopped. A trial that ended before, such as by early stopping, counts with what it had; one that
diverged or failed counts as the worst.
"""

import math
from typing import TYPE_CHECKING

from lsr_scale.config.sweep import StopSection
from lsr_scale.config.training import lower_is_better

if TYPE_CHECKING:
    from lsr_scale.sweeping.folder import SweepState, TrialState


def compare(state: "SweepState") -> "list[TrialState]":
    """Decide at each rung that all have reached who goes on (pending again) and who is stopped; changes the state.

    Trials that were added later are compared with those before them; nothing that was decided is taken back.

    Returns:
        Those that are stopped now.
    """
    stopped: list[TrialState] = []
    if not state.sweep.get("stop"):
        return stopped
    section = StopSection.model_validate(state.sweep["stop"])
    for rung, _ in enumerate(section.rungs()):
        here = [trial for trial in state.trials.values() if _reaches(trial, rung)]
        if any(trial.rung == rung and trial.status in ("pending", "running") for trial in here):
            break  # nor is any later rung complete
        best = kept([_score(trial, rung) for trial in here], section.keep, lower_is_better(state.scored_by))
        for index, trial in enumerate(here):
            if trial.status == "paused" and trial.rung == rung:
                if index in best:
                    trial.status, trial.rung = "pending", rung + 1
                else:
                    trial.status = "stopped"
                    stopped.append(trial)
    return stopped


def kept(scores: list[float | None], keep: float, lower: bool) -> set[int]:
    """Return which of some scores are among the best `keep` of them, one at least; the first of equal ones.

    Args:
        scores: None and NaN are the worst.
        keep: The share, rounded up.
        lower: The lowest are the best.
    """
    numbered = [(value, index) for index, value in enumerate(scores) if value is not None and not math.isnan(value)]
    usable = [(value if lower else -value, index) for value, index in numbered]
    return {index for _, index in sorted(usable)[: max(1, math.ceil(keep * len(scores) - 1e-9))]}


def _reaches(trial: "TrialState", rung: int) -> bool:
    """Tell whether a trial is one of those that are compared at a rung: it was not stopped before."""
    return trial.rung >= rung


def _score(trial: "TrialState", rung: int) -> float | None:
    """Return what a trial had at a rung; what it ended with, if it ended before."""
    if len(trial.rung_scores) > rung:
        return trial.rung_scores[rung]
    return trial.score if trial.status == "finished" else None
