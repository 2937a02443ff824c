"""What a trial's folder says of it: its score, while it trains and after, and what the table shows."""

import math
from typing import Any

from lsr_scale.files import read_json
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import finite_values, read_metrics

_KEPT = (
    "trainable_parameters",
    "steps",
    "final_loss",
    "final_reward",
    "best_step",
    "training_s",
    "tokens_per_s",
    "peak_memory_gib",
)


def results_of(folder: RunFolder, metric: str) -> dict[str, Any]:
    """Return what the sweep keeps of a finished trial's `results.json`: counts, losses, accuracies by task.

    A metric of evaluations that is not there, such as their entropy, is that of the step whose adapter was kept.
    """
    results = read_json(folder.results, "results of a run")
    found = {name: value for name, value in results.items() if name in _KEPT or name.startswith("eval_")}
    accuracy = {task: by_moment["after"]["accuracy"] for task, by_moment in results.get("accuracy", {}).items()}
    if accuracy:
        found["accuracy"] = accuracy
    if metric not in found:
        best = results.get("best_step")
        rows = [row for row in read_metrics(folder.metrics) if metric in row and best in (None, row["step"])]
        if values := finite_values(rows[-1:], metric):
            found[metric] = values[0]
    return found


def score_of(results: dict[str, Any], metric: str) -> float | None:
    """Return a trial's value of a metric; of "accuracy" the mean of its tasks."""
    value = results.get(metric)
    if isinstance(value, dict):
        return sum(value.values()) / len(value) if value else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def newest_score(folder: RunFolder, metric: str) -> float | None:
    """Return the last value of an evaluation's metric, of "final_loss" or "final_reward" training's; None for none.

    A value that is not finite counts as none: it is the worst.
    """
    name = metric.removeprefix("final_")
    rows = [row for row in read_metrics(folder.metrics) if name in row]
    values = finite_values(rows[-1:], name)
    return values[0] if values else None


def steps_of(folder: RunFolder) -> int:
    """Return how many steps a trial has done."""
    return max((row["step"] for row in read_metrics(folder.metrics)), default=0)
