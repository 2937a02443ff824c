"""What a sweep's folder says, for programs."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsr_scale.config.training import lower_is_better
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.sweeping.folder import SweepFolder
from lsr_scale.sweeping.scores import score_of


@dataclass(frozen=True)
class TrialResult:
    """What came of one trial of a sweep.

    Attributes:
        name: Its name.
        changes: The values of the run that it changed, by dotted keys.
        folder: Its folder, a run's: `evaluate`, `export`, `generate` and `load_model` take it.
        status: "finished", "stopped" (at a rung), "diverged", "failed".
        score: What the sweep compares trials by, None where there is none.
        results: Of its `results.json`: counts, times, losses, accuracies by task.
        error: Why it diverged or failed.
    """

    name: str
    changes: dict[str, Any]
    folder: Path
    status: str
    score: float | None = None
    results: dict[str, Any] = field(default_factory=dict, repr=False)
    error: str | None = None


class SweepResults(list[TrialResult]):
    """The trials of a sweep in their order.

    Attributes:
        folder: The sweep's folder.
        scored_by: What trials are compared by: "eval_loss", "accuracy" (the mean of the tasks), "final_loss", ...
    """

    def __init__(self, trials: Sequence[TrialResult], folder: Path, scored_by: str) -> None:
        super().__init__(trials)
        self.folder, self.scored_by = folder, scored_by

    def best(self, metric: str | None = None) -> TrialResult:
        """Return the finished trial with the best value of a metric of its results, by default what they are scored by.

        Raises:
            UserError: if no trial has it.
        """
        name = metric or self.scored_by
        sign = 1 if lower_is_better(name) else -1
        finished = {trial.name: trial for trial in self if trial.status == "finished"}
        scored = {one: score_of(trial.results, name) for one, trial in finished.items()}
        found = [(sign * value, one) for one, value in scored.items() if value is not None]
        if not found:
            known = sorted(
                {key for trial in finished.values() for key, value in trial.results.items() if _is_number(value)}
            )
            raise UserError(f"metric: no finished trial has {name!r}; {did_you_mean(name, known)}")
        return finished[min(found, key=lambda pair: pair[0])[1]]

    def frame(self) -> Any:
        """Return a pandas frame: a row a trial, its changes and numbers as columns.

        Raises:
            UserError: if pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError:
            raise UserError("frame: needs pandas: pip install pandas") from None
        return pandas.DataFrame([self._row(trial) for trial in self])

    @staticmethod
    def _row(trial: TrialResult) -> dict[str, Any]:
        accuracy = {f"accuracy.{task}": value for task, value in trial.results.get("accuracy", {}).items()}
        numbers = {name: value for name, value in trial.results.items() if name != "accuracy"}
        own = {"trial": trial.name, **trial.changes, "status": trial.status, "score": trial.score}
        return {**own, **numbers, **accuracy, "folder": str(trial.folder)}


def read_results(folder: SweepFolder) -> SweepResults:
    """Return what came of a sweep's trials.

    Raises:
        UserError: if there is no sweep.
    """
    state = folder.read()
    trials = [
        TrialResult(
            trial.name,
            trial.changes,
            folder.trial(trial.name).path,
            trial.status,
            trial.score,
            trial.results,
            trial.error,
        )
        for trial in state.trials.values()
    ]
    return SweepResults(trials, folder.path, state.scored_by)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
