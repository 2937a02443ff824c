"""The figure of rewards over the steps, of training methods that have them: GRPO's, or those of preferences."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsr_scale.run.metrics import finite_values, read_metrics
from lsr_scale.run.plots import COLORS, SIZE, figure_legend, save_figure, smoothed_points, titled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Sequence[dict[str, Any]]


def rewards_figure(metrics: Metrics, title: str, size: tuple[float, float] = SIZE) -> "Figure | None":
    """Return the figure of the rewards of a run's `metrics.jsonl`, None where none was logged."""
    if not any("reward" in row for row in metrics):
        return _of_preferences(metrics, title, size)
    return _of_completions(metrics, title, size)


def draw_rewards(metrics: Path, picture: Path, title: str) -> bool:
    """Draw `rewards_figure` as a PNG; return False where no rewards were logged."""
    figure = rewards_figure(read_metrics(metrics), title)
    if figure is None:
        return False
    save_figure(figure, picture)
    return True


def _of_completions(metrics: Metrics, title: str, size: tuple[float, float]) -> "Figure":
    """Return GRPO's: the reward and its parts above; lengths, KL and the share that was cut below."""
    figure, (above, below) = titled_figure(title, (size[0], 1.5 * size[1]), rows=2)
    parts = [name for row in metrics for name in row if name.startswith("rewards/") and name.endswith("/mean")]
    names = {"reward": "reward", **{name: name.split("/")[1] for name in dict.fromkeys(parts)}}
    if len(names) == 2:
        names = {"reward": names.popitem()[1]}
    for color, (name, label) in zip(COLORS * 2, names.items(), strict=False):
        width = 2.0 if name == "reward" else 1.0
        above.plot(*smoothed_points(_points(metrics, name)), color=color, linewidth=width, label=label)
    if evaluated := _points(metrics, "eval_reward"):
        above.plot(*zip(*evaluated, strict=True), "o--", color=COLORS[0], markersize=4, label="evaluation")
    above.set(ylabel="reward")
    below.plot(*smoothed_points(_points(metrics, "completions/mean_length")), color=COLORS[0], label="length")
    below.set(xlabel="step", ylabel="tokens of a completion")
    other = below.twinx()
    for color, name, label in ((COLORS[1], "kl", "KL, nats"), (COLORS[2], "completions/clipped_ratio", "share cut")):
        if points := _points(metrics, name):
            other.plot(*smoothed_points(points), "--", color=color, label=f"{label} (right axis)")
    other.set_ylim(bottom=0)
    other.spines[["top"]].set_visible(False)
    above.legend(frameon=False, fontsize=8.5)
    lines = [*below.lines, *other.lines]
    # below the panel: "best" places it by the lines of one of the two axes alone
    place = {"loc": "outside lower center", "ncols": len(lines)}
    figure.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8.5, **place)
    return figure


def _of_preferences(metrics: Metrics, title: str, size: tuple[float, float]) -> "Figure | None":
    """Return that of preferred and other completions, None where none was logged.

    A reward is beta times the log-ratio to the reference (ORPO: times the mean log-probability); accuracy is the share
    of pairs whose chosen completion has the higher one, the KL that of KTO.
    """
    names = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin", "kl": "KL"}
    figure, axes = titled_figure(title, size)
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        if points := _points(metrics, name):
            axes.plot(*smoothed_points(points), "-", color=color, label=label)
        if points := _points(metrics, f"eval_{name}"):
            axes.plot(*zip(*points, strict=True), "o--", color=color, markersize=4, linewidth=0.8, alpha=0.75)
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel="reward, nats (dots: evaluations)")
    if shares := _points(metrics, "rewards/accuracies"):
        from matplotlib.ticker import PercentFormatter

        other = axes.twinx()
        other.plot(*smoothed_points(shares), ":", color=COLORS[4], label="accuracy (right axis)")
        other.set_ylim(0, 1)
        other.yaxis.set_major_formatter(PercentFormatter(1.0))
        other.spines[["top"]].set_visible(False)
    figure_legend(figure)
    return figure


def _points(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in metrics if finite_values([row], name)]
