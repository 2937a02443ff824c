"""GUIDE.md's tables of what was measured about methods, sizes and options."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality import ablations, glue, sequential, trials, vision
from benchmarks.report import (
    commonsense_tables,
    frontier_variants,
    frontier_words,
    grpo_words,
    large_models,
    sharing_words,
)
from benchmarks.report.markdown import with_table
from benchmarks.report.readme import scaling_table

SWEEP = "parametrization/smollm2-h200-first.json"
WIDTH = "parametrization/width-cpu.json"

Row = dict[str, Any]


def sweep_rows(results: Path) -> list[Row]:
    """Return the sweep's rows of the start that became the default, LoRA's, and zero-shot's."""
    rows = json.loads((results / SWEEP).read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["method"] != "lsr" or row["power"] == 0]


def width_rows(results: Path) -> list[Row]:
    """Return the rows of the sweep over widths."""
    return json.loads((results / WIDTH).read_text(encoding="utf-8"))["rows"]


def label(row: Row) -> str:
    """Return a setting's name."""
    if row["method"] == "lora":
        return f"LoRA r={row['rank']}"
    return f"LSR r={row['rank']} s={row['separation_rank']}"


def by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    """Return rows by setting, the smallest adapter first where the rows say how large they are."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.get("trainable_parameters", 0)):
        if row["method"] != "zero_shot":
            groups.setdefault(label(row), []).append(row)
    return groups


def sizes_table(results: Path) -> str:
    """Return each setting of the sweep at its best rate."""
    lines = ["| | parameters | best rate tried | loss | accuracy, % |", "|---|---:|---:|---:|---:|"]
    for name, rows in by_setting(sweep_rows(results)).items():
        best = min(rows, key=lambda row: row["held_out_loss"])
        edge = best["lr"] in (min(row["lr"] for row in rows), max(row["lr"] for row in rows))
        rate = f"{best['lr']:g}" + (" (end of its grid)" if edge else "")
        accuracy = 100 * best["held_out_accuracy"]
        cells = (name, f"{best['trainable_parameters']:,}", rate, f"{best['held_out_loss']:.3f}", f"{accuracy:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def width_table(results: Path) -> str:
    """Return the best rate and what is left of the variance, by width."""
    widths = sorted({row["width"] for row in width_rows(results)})
    lines = ["| | " + " | ".join(f"width {width:,}" for width in widths) + " |", "|---|" + "---|" * len(widths)]
    for name, rows in by_setting(width_rows(results)).items():
        cells = [f"{row['best_rate']:.4f}, {row['loss']:.2f}" for row in sorted(rows, key=lambda row: row["width"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


NOT_RUN = "Not run yet."


def has_tests(folder: Path) -> bool:
    """Tell whether a comparison has come further than its tuning."""
    return any(result["seed"] != trials.TUNING_SEED for result in trials.load(folder).values())


def trial_table(folder: str, providers: Any, results: Path) -> str:
    """Return a comparison's table, or that it has not been run."""
    done = trials.load(results / folder)
    return "\n".join(trials.table(done, providers)) if has_tests(results / folder) else NOT_RUN


def ablation_tables(results: Path) -> str:
    """Return the ablations' tables, or that they have not been run."""
    folder = results / "ablations"
    return "\n".join(ablations.tables(folder)).rstrip() if has_tests(folder) else NOT_RUN


def condition_line(results: Path) -> str:
    """Return how far the terms of a sum cancelled in any of the ablations' runs, tuning included."""
    runs = trials.load(results / "ablations").values()
    runs = [run for run in runs if all(key in run for key in ablations.CONDITIONS)]
    if not runs:
        return NOT_RUN
    highest = max(runs, key=lambda run: max(run[key] for key in ablations.CONDITIONS))
    gamma = max(highest[key] for key in ablations.CONDITIONS)
    rates = [run["settings"]["learning_rate"] for run in runs]
    return (
        f"Constructed to cancel. In {len(runs)} runs of the ablations below, at rates from {min(rates):g} to "
        f"{max(rates):g}, the largest gamma of a module was {gamma:.2f} ({highest['provider']})."
    )


def sequential_tables(results: Path) -> str:
    """Return what is left of a first task after a second, or that it has not been run."""
    return sequential.table(results / "sequential") or NOT_RUN


def accuracy_table(results: Path) -> str:
    """Return every row of the accuracy comparison."""
    return commonsense_tables.short_table(commonsense_tables.load(results / "commonsense"))


TABLES: dict[str, Callable[[Path], str]] = {
    "scaling": lambda results: scaling_table(results / "scaling"),
    "large models": large_models.guide,
    "sharing steps": sharing_words.guide,
    "accuracy": accuracy_table,
    "by size": lambda results: frontier_words.guide(results / "frontier"),
    "reinforcement by size": lambda results: grpo_words.guide(results / "grpo"),
    "starts and optimizers": lambda results: frontier_variants.guide(results / "frontier"),
    "sizes": sizes_table,
    "widths": width_table,
    "vision": functools.partial(trial_table, "vision", vision.PROVIDERS),
    "glue pilot": functools.partial(trial_table, "glue/minilm-sst2-cpu", glue.PROVIDERS),
    "glue": functools.partial(trial_table, "glue", glue.PROVIDERS),
    "glue frozen": functools.partial(trial_table, "glue/frozen", glue.PROVIDERS),
    "sequential": sequential_tables,
    "condition": condition_line,
    "ablations": ablation_tables,
}


def filled(text: str, results: Path) -> str:
    """Return GUIDE.md's text with its tables made of the measurements in the folder of all results."""
    for name, table in TABLES.items():
        text = with_table(text, name, table(results), "GUIDE.md")
    return text
