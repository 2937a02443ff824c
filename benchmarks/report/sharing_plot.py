"""GUIDE.md's plot of shared steps: how near trials come to the base's own throughput, one by one and together."""

import functools
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.report.drawing import card, rows_digest, save
from benchmarks.report.measurements import Run
from benchmarks.report.plots import Plot
from benchmarks.report.sharing_words import case_name, newest_steps

Step = tuple[Run, dict[str, Any]]
# the times that are drawn: their name, what they are called, and whether they are of one trial alone
WAYS = {
    "short": ("one after the other, without CUDA graphs", True),
    "short_graphs": ("one after the other", True),
    "joint_graphs": ("together", False),
    "long_graphs": ("one adapter with the tokens of all", False),
}
COLORS = ("#c9c9c9", "#8a8a8a", "#d62728", "#1f77b4")


def shares(case: dict[str, Any]) -> dict[str, float | None]:
    """Return by way the share of the base's own throughput in the tokens of all trials; None where it has no time."""
    times, base = case["step_ms"], case["step_ms"]["base_graphs"]
    return {
        way: base / (times[way] * (case["trials"] if alone else 1)) if times.get(way) else None
        for way, (_, alone) in WAYS.items()
    }


def draw(steps: list[Step], path: Path) -> None:
    """Draw the cases' shares as bars, a group each."""
    figure, axis = pyplot.subplots(figsize=(8.5, 1.2 + 1.1 * len(steps)))
    height = 0.8 / len(WAYS)
    for place, ((way, (label, _)), color) in enumerate(zip(WAYS.items(), COLORS, strict=True)):
        values = [shares(case)[way] for _, case in steps]
        at = [row + (place - (len(WAYS) - 1) / 2) * height for row in range(len(steps))]
        bars = axis.barh(at, [value or 0 for value in values], height, color=color, label=label)
        axis.bar_label(bars, [f"{value:.2f}" if value else "not run" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(steps)), [case_name(case).replace(", ", "\n", 1) for _, case in steps], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.axvline(1, color="black", lw=1)
    axis.set_xlabel("tokens/s over those of the base without any adapter, of as many tokens a step")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.02), ncols=2)
    axis.set_ylim(len(steps) - 0.5, -1.0)
    axis.set_title(f"Steps of several trials, one {card(steps[0][0]['env'])}", fontsize=11)
    figure.tight_layout()
    save(figure, path, digest(steps))


def digest(steps: list[Step]) -> str:
    """Return what the plot of these steps is recognized by."""
    return rows_digest([[case_name(case), shares(case)] for _, case in steps])


def plots(results: Path) -> dict[Path, Plot]:
    """Return the plot by its file; none without a case of which the base alone was measured."""
    steps = [(run, case) for run, case in newest_steps(results / "joint_step") if "base_graphs" in case["step_ms"]]
    if not steps:
        return {}
    return {results / "joint_step" / "sharing.png": Plot(digest(steps), functools.partial(draw, steps))}
