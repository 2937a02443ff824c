"""The tables and plots of GUIDE.md, from the committed measurements.

python -m benchmarks.report.guidelines            write them
python -m benchmarks.report.guidelines --check    fail if any of them is not what the JSON says
"""

import argparse
import functools
import hashlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks import ALL_RESULTS, ROOT
from benchmarks.quality import ablations, glue, sequential, trials, vision
from benchmarks.report import commonsense_tables
from benchmarks.report.plots import drawn_from
from benchmarks.report.results_page import with_table

PAGE = ROOT / "GUIDE.md"
SWEEP = ALL_RESULTS / "parametrization/smollm2-h200-first.json"
WIDTH = ALL_RESULTS / "parametrization/width-cpu.json"
PILOT = ALL_RESULTS / "glue/minilm-sst2-cpu"

Row = dict[str, Any]


def sweep_rows() -> list[Row]:
    """Return the sweep's rows of the start that became the default, LoRA's, and zero-shot's."""
    rows = json.loads(SWEEP.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["method"] != "lsr" or row["power"] == 0]


def width_rows() -> list[Row]:
    """Return the rows of the sweep over widths."""
    return json.loads(WIDTH.read_text(encoding="utf-8"))["rows"]


def label(row: Row) -> str:
    """Return a setting's name."""
    if row["method"] == "lora":
        return f"LoRA r={row['rank']}"
    return f"LSR r={row['rank']} s={row['separation_rank']}"


def by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    """Return rows by setting, the smallest adapter first where the rows say how large they are."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.get("trainable_parameters", 0)):
        if row["method"] != "zero_shot":
            found.setdefault(label(row), []).append(row)
    return found


def sizes_table() -> str:
    """Return each setting of the sweep at its best rate."""
    lines = ["| | parameters | best rate tried | loss | accuracy, % |", "|---|---:|---:|---:|---:|"]
    for name, rows in by_setting(sweep_rows()).items():
        best = min(rows, key=lambda row: row["held_out_loss"])
        edge = best["lr"] in (min(row["lr"] for row in rows), max(row["lr"] for row in rows))
        rate = f"{best['lr']:g}" + (" (end of its grid)" if edge else "")
        accuracy = 100 * best["held_out_accuracy"]
        cells = (name, f"{best['trainable_parameters']:,}", rate, f"{best['held_out_loss']:.3f}", f"{accuracy:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def width_table() -> str:
    """Return the best rate and what is left of the variance, by width."""
    widths = sorted({row["width"] for row in width_rows()})
    lines = ["| | " + " | ".join(f"width {width:,}" for width in widths) + " |", "|---|" + "---|" * len(widths)]
    for name, rows in by_setting(width_rows()).items():
        cells = [f"{row['best_rate']:.4f}, {row['loss']:.2f}" for row in sorted(rows, key=lambda row: row["width"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


NOT_RUN = "Not run yet."


def has_tests(folder: Path) -> bool:
    """Tell whether a comparison has come further than its tuning."""
    return any(result["seed"] != trials.TUNING_SEED for result in trials.load(folder).values())


def trial_table(folder: Path, providers: Any) -> str:
    """Return a comparison's table, or that it has not been run."""
    return "\n".join(trials.table(trials.load(folder), providers)) if has_tests(folder) else NOT_RUN


def ablation_tables() -> str:
    """Return the ablations' tables, or that they have not been run."""
    return "\n".join(ablations.tables(ablations.RESULTS)).rstrip() if has_tests(ablations.RESULTS) else NOT_RUN


def condition_line() -> str:
    """Return how far the terms of a sum cancelled in any of the ablations' runs, tuning included."""
    runs = [run for run in trials.load(ablations.RESULTS).values() if all(key in run for key in ablations.CONDITIONS)]
    if not runs:
        return NOT_RUN
    highest = max(runs, key=lambda run: max(run[key] for key in ablations.CONDITIONS))
    gamma = max(highest[key] for key in ablations.CONDITIONS)
    rates = [run["settings"]["learning_rate"] for run in runs]
    return (
        f"Constructed to cancel. In {len(runs)} runs of the ablations below, at rates from {min(rates):g} to "
        f"{max(rates):g}, the largest gamma of a module was {gamma:.2f} ({highest['provider']})."
    )


def sequential_tables() -> str:
    """Return what is left of a first task after a second, or that it has not been run."""
    return sequential.table(sequential.RESULTS) or NOT_RUN


def terms_plot(path: Path) -> None:
    """Draw the held-out loss against the parameters, at the best rate, and against the rate."""
    figure, (size, rate) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    groups = by_setting(sweep_rows())
    best = {name: min(rows, key=lambda row: row["held_out_loss"]) for name, rows in groups.items()}
    for prefix, marker in (("LSR r=16", "o-"), ("LoRA", "s-"), ("LSR r=4", "^")):
        points = [
            (row["trainable_parameters"], row["held_out_loss"]) for n, row in best.items() if n.startswith(prefix)
        ]
        size.plot(*zip(*points, strict=True), marker, label=prefix)
    for name, rows in groups.items():
        points = sorted((row["lr"], row["held_out_loss"]) for row in rows if row["held_out_loss"] < 4.5)
        rate.plot(*zip(*points, strict=True), "o-", label=name)
    size.set_xscale("log")
    size.set_xticks([3e5, 1e6, 3e6], ["300k", "1M", "3M"])
    size.minorticks_off()
    size.set_xlabel("trainable parameters")
    size.set_ylabel("held-out loss, nats per token")
    rate.set_xscale("log")
    rates = sorted({row["lr"] for row in sweep_rows() if "lr" in row})
    rate.set_xticks(rates, [f"{value:g}" for value in rates])
    rate.minorticks_off()
    rate.set_xlabel("learning rate (losses above 4.5 are off the plot)")
    for axis in (size, rate):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle("SmolLM2-135M, ARC and OpenBookQA, one epoch, one seed")
    _save(figure, path, sweep_rows())


def width_plot(path: Path) -> None:
    """Draw the best rate, and the share of the variance left, against the width."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, rows in by_setting(width_rows()).items():
        rows = sorted(rows, key=lambda row: row["width"])
        for axis, key in zip(axes, ("best_rate", "loss"), strict=True):
            axis.plot([row["width"] for row in rows], [row[key] for row in rows], "o-", label=name)
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylabel("best learning rate")
    axes[1].set_ylabel("share of the output's variance left")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("width of the layer")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle("a linear teacher of rank 4, without Kronecker structure")
    _save(figure, path, width_rows())


def ablation_rows() -> list[Row]:
    """Return the ablations' seeds that did not diverge, by setting."""
    tests = [run for run in trials.load(ablations.RESULTS).values() if run["seed"] != trials.TUNING_SEED]
    kept = ("provider", "seed", "score", "adapter_parameters")
    return [{key: run[key] for key in kept} for run in tests if run["score"] is not None]


def ablation_plot(path: Path) -> None:
    """Draw the accuracy against the parameters: as terms are added, and as rank takes the place of terms."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    found: dict[str, list[float]] = {}
    for row in ablation_rows():
        found.setdefault(row["provider"], []).append(100 * row["score"])
    sizes = {row["provider"]: row["adapter_parameters"] for row in ablation_rows()}
    for axis, names, label in ((axes[0], ablations.AXES["terms"], "terms"), (axes[1], ablations.AXES["rank"], "rank")):
        ours = [name for name in names if name in found and not name.startswith("lora")]
        places = [sizes[name] for name in ours] if label == "terms" else list(range(len(ours)))
        means, spreads = zip(*((statistics.fmean(found[n]), statistics.stdev(found[n])) for n in ours), strict=True)
        axis.errorbar(places, means, spreads, fmt="o-", capsize=3, label="LSR-Adapt")
        for place, mean, name in zip(places, means, ours, strict=True):
            axis.annotate(name.replace("_", " "), (place, mean), (4, -11), textcoords="offset points", fontsize=7)
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
    for name in ("lora_2", "lora_8"):
        axes[0].errorbar(
            sizes[name],
            statistics.fmean(found[name]),
            statistics.stdev(found[name]),
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
    figure.suptitle("SmolLM2-135M, a tenth of ARC and OpenBookQA held out, two epochs")
    _save(figure, path, ablation_rows())


def _save(figure: Any, path: Path, rows: list[Row]) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Source": digest(rows)})
    pyplot.close(figure)


def digest(rows: list[Row]) -> str:
    """Return what a plot of these rows is recognized by."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def accuracy_table() -> str:
    """Return every row of the accuracy comparison."""
    return commonsense_tables.short_table(commonsense_tables.load(ALL_RESULTS / "commonsense"))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "sizes": sizes_table,
    "widths": width_table,
    "vision": functools.partial(trial_table, vision.RESULTS, vision.PROVIDERS),
    "glue pilot": functools.partial(trial_table, PILOT, glue.PROVIDERS),
    "glue": functools.partial(trial_table, glue.RESULTS, glue.PROVIDERS),
    "glue frozen": functools.partial(trial_table, glue.FROZEN_RESULTS, glue.PROVIDERS),
    "sequential": sequential_tables,
    "condition": condition_line,
    "ablations": ablation_tables,
}
PLOTS: dict[str, tuple[Callable[[Path], None], Callable[[], list[Row]]]] = {
    "terms.png": (terms_plot, sweep_rows),
    "width.png": (width_plot, width_rows),
    "ablations.png": (ablation_plot, ablation_rows),
}


def filled(text: str) -> str:
    """Return the page with every table made anew."""
    for name, table in TABLES.items():
        text = with_table(text, name, table(), PAGE.name)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write everything, or with --check compare it; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args(arguments).check
    text = PAGE.read_text(encoding="utf-8")
    wanted = filled(text)
    folder = SWEEP.parent
    old = [name for name, (_, rows) in PLOTS.items() if drawn_from(folder / name) != digest(rows())]
    stale = [*(["GUIDE.md"] if wanted != text else []), *old]
    if check:
        for name in stale:
            print(
                f"{name} is not what the measurements say; run python -m benchmarks.report.guidelines", file=sys.stderr
            )
        return int(bool(stale))
    PAGE.write_text(wanted, encoding="utf-8")
    for name in old:
        PLOTS[name][0](folder / name)
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
