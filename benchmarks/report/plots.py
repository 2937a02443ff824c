"""Plots of training steps: tokens/s against memory, and against the tokens of a step and of a sequence.

A plot carries a digest of what it shows, so that one that is older than its measurement is noticed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from PIL import Image

from benchmarks.report.drawing import card, rows_digest, save, thousands
from benchmarks.report.measurements import LABELS, MODES, by_provider, has_scaling, newest_headline, read, sweeps
from benchmarks.speed.providers import bf16_of, compute_of

IN_BF16 = [name for name in LABELS if compute_of(name) == "bf16"]
COLORS = {name: f"C{index}" for index, name in enumerate(IN_BF16)} | {"lsr_graphs": "black"}  # C10 is C0 again


def color(provider: str) -> str:
    """Return a provider's color: in FP8 and int8 that of the same in bfloat16."""
    return COLORS[bf16_of(provider)]


def marker(provider: str) -> str:
    """Return a provider's marker: a diamond in FP8, a square in int8."""
    return {"bf16": "o", "fp8": "D", "int8": "s"}[compute_of(provider)]


@dataclass(frozen=True)
class Plot:
    """A plot to be made: the digest of the rows that it shows, and what draws it into a file."""

    digest: str
    draw: Callable[[Path], None]


def digest(run: dict[str, Any]) -> str:
    """Return what a plot of these rows is recognized by."""
    names = ("provider", "checkpointing", "tokens", "seq_len", "tokens_per_s", "peak_memory_gib")
    return rows_digest([[row[name] for name in names] for row in run["rows"]])


def drawn_from(picture: Path) -> str | None:
    """Return the digest of the results that a plot was drawn from, None where there is no plot."""
    return Image.open(picture).info.get("Source") if picture.exists() else None


def memory_plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s against memory: one color a provider, filled where all activations are saved."""
    figure, axis = pyplot.subplots(figsize=(8, 5))
    providers = by_provider(run)
    for depth, (name, modes) in enumerate(providers.items()):
        points = {mode: row for mode, row in modes.items() if row["status"] == "ok" and mode in MODES}
        for mode, row in points.items():
            face = color(name) if mode == "none" else "none"
            label = LABELS[name].replace("*", "").replace("`", "") if mode == "none" else None
            # those that are as fast in as much memory stay visible: the later, the smaller and the further up
            size = 150 * 0.72**depth + 16
            style = {"marker": marker(name), "s": size, "facecolors": face, "edgecolors": color(name), "label": label}
            style |= {"zorder": 3 + depth, "linewidths": 1.5}
            axis.scatter(row["peak_memory_gib"], row["tokens_per_s"], **style)
    axis.set_xlabel("peak memory, GiB")
    axis.set_ylabel("tokens/s")
    axis.set_xlim(0)
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    thousands(axis.yaxis)
    heading = "filled: activations saved; open: recomputed"
    legend = axis.legend(frameon=False, fontsize=8, loc="lower right", title=heading, title_fontsize=8)
    handle: Any
    for handle in legend.legend_handles:
        handle.set_sizes([50])
    config, rows = run["config"], run["rows"]
    title = f"{config['model']}, {config['base'].upper()}, {rows[0]['tokens']:,} tokens a step, one {card(run['env'])}"
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    save(figure, path, digest(run))


PANELS = {
    "tokens": ("seq_len", "tokens a step, sequences of {:,}"),
    "seq_len": ("tokens", "length, {:,} tokens a step"),
}


def sweep_plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s, all activations saved: against tokens a step at one length, against length at one number."""
    rows = [row for row in run["rows"] if row["status"] == "ok" and row["checkpointing"] == "none"]
    panels = sweeps(run)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 4.6), sharey=True, squeeze=False)
    shown: dict[str, Any] = {}
    for axis, (across, (value, ticks)) in zip(axes[0], panels.items(), strict=True):
        fixed, words = PANELS[across]
        for name in LABELS:
            points = sorted((r[across], r["tokens_per_s"]) for r in rows if (r["provider"], r[fixed]) == (name, value))
            if points:
                (shown[name],) = axis.plot(*zip(*points, strict=True), f"{marker(name)}-", color=color(name))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axis.set_xlabel(words.format(value))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens/s")
    axes[0][0].set_ylim(0)
    thousands(axes[0][0].yaxis)
    config = run["config"]
    title = f"{config['model']}, {config['base'].upper()}, activations saved, one {card(run['env'])}"
    figure.suptitle(title, fontsize=11)
    labels = [LABELS[name].replace("*", "") for name in shown]
    figure.legend(shown.values(), labels, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save(figure, path, digest(run))


def scaling_plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s against the number of GPUs, a line a ZeRO stage, with the line of as many times one GPU."""
    figure, axis = pyplot.subplots(figsize=(6, 4.2))
    rows = [row for row in run["rows"] if row["status"] == "ok"]
    most = max(row["num_gpus"] for row in rows)
    for row in rows:
        if row["zero_stage"] is None:
            axis.plot([1, most], [row["tokens_per_s"], most * row["tokens_per_s"]], "k--", label="times one GPU alone")
    for stage in sorted({row["zero_stage"] for row in rows} - {None}):
        points = sorted((row["num_gpus"], row["tokens_per_s"]) for row in rows if row["zero_stage"] == stage)
        axis.plot(*zip(*points, strict=True), "o-", label=f"ZeRO-{stage}")
    axis.set_xticks(range(1, most + 1))
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens/s")
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    config = run["config"]
    thousands(axis.yaxis)
    what = f"{config['model']}, {config['base'].upper()}, {config['tokens']:,} tokens a GPU and step"
    axis.set_title(f"{what}, {card(run['env'])}", fontsize=10)
    figure.tight_layout()
    save(figure, path, scaling_digest(run))


def scaling_digest(run: dict[str, Any]) -> str:
    """Return what a plot of these rows is recognized by."""
    return rows_digest(
        [[row[name] for name in ("num_gpus", "zero_stage", "status", "tokens_per_s")] for row in run["rows"]]
    )


def plots(results: Path) -> dict[Path, Plot]:
    """Return the plots of throughput and of scaling by their file, beside the measurements that they show."""
    throughput, plots_by_file = results / "throughput", {}
    run = newest_headline(throughput)
    plots_by_file[throughput / "mistral-7b-nf4.png"] = Plot(digest(run), functools.partial(memory_plot, run))
    for path, sweep in read(throughput):
        if sweeps(sweep):
            plots_by_file[path.with_suffix(".png")] = Plot(digest(sweep), functools.partial(sweep_plot, sweep))
    for path, run in read(results / "scaling"):
        if has_scaling(run):
            plots_by_file[path.with_suffix(".png")] = Plot(scaling_digest(run), functools.partial(scaling_plot, run))
    return plots_by_file
