"""GUIDE.md's plots: loss against size, the best rate against width, accuracy against terms."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.quality import ablations, trials
from benchmarks.report.drawing import label_points, rows_digest, save
from benchmarks.report.guide import Row, by_setting, sweep_rows, width_rows
from benchmarks.report.plots import Plot


def ablation_rows(results: Path) -> list[Row]:
    """Return the ablations' seeds that did not diverge, by setting."""
    tests = [run for run in trials.load(results / "ablations").values() if run["seed"] != trials.TUNING_SEED]
    fields = ("provider", "seed", "score", "adapter_parameters")
    return [{key: run[key] for key in fields} for run in tests if run["score"] is not None]


def terms_plot(rows: list[Row], path: Path) -> None:
    """Draw the held-out loss against the parameters, at the best rate, and against the rate."""
    figure, (size, rate) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    groups = by_setting(rows)
    best = {name: min(group, key=lambda row: row["held_out_loss"]) for name, group in groups.items()}
    for prefix, marker in (("LSR r=16", "o-"), ("LoRA", "s-"), ("LSR r=4", "^")):
        points = [
            (row["trainable_parameters"], row["held_out_loss"]) for n, row in best.items() if n.startswith(prefix)
        ]
        size.plot(*zip(*points, strict=True), marker, label=prefix)
    for name, group in groups.items():
        points = sorted((row["lr"], row["held_out_loss"]) for row in group if row["held_out_loss"] < 4.5)
        rate.plot(*zip(*points, strict=True), "o-", label=name)
    size.set_xscale("log")
    size.set_xticks([3e5, 1e6, 3e6], ["300k", "1M", "3M"])
    size.minorticks_off()
    size.set_xlabel("trainable parameters")
    size.set_ylabel("held-out loss, nats per token")
    rate.set_xscale("log")
    rates = sorted({row["lr"] for row in rows if "lr" in row})
    rate.set_xticks(rates, [f"{value:g}" for value in rates])
    rate.minorticks_off()
    rate.set_xlabel("learning rate (losses above 4.5 are off the plot)")
    for axis in (size, rate):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle("SmolLM2-135M, ARC and OpenBookQA, one epoch, one seed")
    _save(figure, path, rows)


def width_plot(rows: list[Row], path: Path) -> None:
    """Draw the best rate, and the share of the variance left, against the width."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, group in by_setting(rows).items():
        group = sorted(group, key=lambda row: row["width"])
        for axis, key in zip(axes, ("best_rate", "loss"), strict=True):
            axis.plot([row["width"] for row in group], [row[key] for row in group], "o-", label=name)
    axes[0].set_yscale("log", base=2)
    rates = sorted({row["best_rate"] for row in rows})
    axes[0].set_yticks(rates, [f"{rate:.2g}" for rate in rates])
    axes[0].set_ylabel("best learning rate")
    axes[1].set_ylabel("share of the output's variance left")
    for axis in axes:
        axis.set_xscale("log", base=2)
        widths = sorted({row["width"] for row in rows})
        axis.set_xticks(widths, [f"{width:,}" for width in widths])
        axis.minorticks_off()
        axis.set_xlabel("width of the layer")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle("a linear teacher of rank 4, without Kronecker structure")
    _save(figure, path, rows)


def ablation_plot(rows: list[Row], path: Path) -> None:
    """Draw the accuracy against the parameters: as terms are added, and as rank takes the place of terms."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["provider"], []).append(100 * row["score"])
    sizes = {row["provider"]: row["adapter_parameters"] for row in rows}
    names_at: dict[Any, list[tuple[float, float, str, str]]] = {}
    for axis, names, label in ((axes[0], ablations.AXES["terms"], "terms"), (axes[1], ablations.AXES["rank"], "rank")):
        ours = [name for name in names if name in scores and not name.startswith("lora")]
        places = [sizes[name] for name in ours] if label == "terms" else list(range(len(ours)))
        means, spreads = zip(*((statistics.fmean(scores[n]), statistics.stdev(scores[n])) for n in ours), strict=True)
        axis.errorbar(places, means, spreads, fmt="o-", capsize=3, label="LSR-Adapt")
        names_at[axis] = [
            (x, y, name.replace("_", " "), "black") for x, y, name in zip(places, means, ours, strict=True)
        ]
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
    for name in ("lora_2", "lora_8"):
        axes[0].errorbar(
            sizes[name],
            statistics.fmean(scores[name]),
            statistics.stdev(scores[name]),
            fmt="s",
            capsize=3,
            label=name.replace("lora_", "LoRA r="),
        )
    axes[0].set_xscale("log")
    axes[0].set_xticks([1e5, 3e5, 1e6, 3e6], ["100k", "300k", "1M", "3M"])
    axes[0].minorticks_off()
    axes[0].set(xlabel="trainable parameters: 1 to 48 terms of rank 16", ylabel="accuracy, %; bars: three seeds")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel="rank against terms at 1,397,760 parameters", xticks=[])
    figure.suptitle("SmolLM2-135M, a tenth of ARC and OpenBookQA held out, two epochs", fontsize=11)
    figure.tight_layout()
    for axis, points in names_at.items():
        label_points(axis, points)
    _save(figure, path, rows)


def _save(figure: Any, path: Path, rows: list[Row]) -> None:
    figure.tight_layout()
    save(figure, path, rows_digest(rows))


PLOTS: dict[str, tuple[Callable[[list[Row], Path], None], Callable[[Path], list[Row]]]] = {
    "terms.png": (terms_plot, sweep_rows),
    "width.png": (width_plot, width_rows),
    "ablations.png": (ablation_plot, ablation_rows),
}


def plots(results: Path) -> dict[Path, Plot]:
    """Return GUIDE.md's plots by their file, made of the measurements in the folder of all results."""
    plots_by_file = {}
    for name, (draw, rows_of) in PLOTS.items():
        rows = rows_of(results)
        plots_by_file[results / "parametrization" / name] = Plot(rows_digest(rows), functools.partial(draw, rows))
    return plots_by_file
