"""What the page of a comparison shows."""

from collections.abc import Iterator
from typing import Any

from lsr_scale.config.comparison import OBJECTIVES, metric_words
from lsr_scale.errors import shortened
from lsr_scale.report.figures import drawn
from lsr_scale.report.run_page import direction
from lsr_scale.run.compare import Comparison, Loss, RunSummary, Score
from lsr_scale.run.compare_tables import number, says_something, signed_percent, value_text
from lsr_scale.run.plots import curves_figure
from lsr_scale.units import byte_size, clock


def comparison_page(comparison: Comparison) -> dict[str, Any]:
    """Return the values of `comparison.html.jinja`."""
    letters, runs = comparison.letters, comparison.runs
    cells = [_cells(run) for run in runs]
    same_machine = len({run.machine for run in runs}) == 1
    columns = [name for index, (name, _) in enumerate(cells[0]) if any(row[index][1] for row in cells)]
    columns = [name for name in columns if name != "machine" or not same_machine]
    run_rows = [
        {
            "letter": letter,
            "name": name,
            "more": f"{run.method or '?'} on {run.model or '?'} {run.quantization or ''}",
            "cells": [(name, value) for name, value in row if name in columns],
        }
        for letter, name, run, row in zip(letters, comparison.short_names, runs, cells, strict=True)
    ]
    differing = {**comparison.config, **{f"version of {name}": row for name, row in comparison.versions.items()}}
    config_rows = [
        (key, list(zip(letters, (shortened(value_text(value), 400) for value in row), strict=True)))
        for key, row in differing.items()
        if says_something(row)
    ]
    figures = []
    curves = comparison.curves()
    if any(points for of_run in curves.values() for points in of_run.values()):
        what = " or ".join(comparison.objectives)
        ends = [
            f"{letter} ends at {f'{run.objective} ' if len(comparison.objectives) > 1 else ''}"
            f"{number(run.judged.train, 3)}"
            if run.judged.train is not None
            else f"{letter} ends at no {run.objective}"
            for letter, run in zip(letters, runs, strict=True)
        ]
        alt = f"{what.capitalize()} over the steps of {len(runs)} runs: {', '.join(ends)}"
        figures.append(drawn(lambda size: curves_figure(curves, "", size), alt, ""))
    tables = [{"task": task, "rows": rows} for task, rows in _score_tables(comparison).items()]
    sections = (
        ("runs", "Runs", True),
        ("notes", "Notes", comparison.notes),
        ("curves", "Curves", figures),
        ("scores", "Scores", tables),
        ("config", "What differs", True),
    )
    models = list(dict.fromkeys(str(run.model) for run in runs))
    lead = f"on {', '.join(models)}" if len(models) < 4 else "on several models"
    lead += f", {runs[0].machine}" if same_machine else ""
    return {
        "title": f"{len(runs)} runs compared",
        "plural": "s",
        "lead": f"{lead}; differences are from the first, A",
        "run_columns": columns,
        "run_rows": run_rows,
        "notes_said": comparison.notes,
        "figures": figures,
        "score_tables": tables,
        "config_rows": config_rows,
        "config_left": [key for key, row in differing.items() if not says_something(row)],
        "letters": letters,
        "sections": [(id, name) for id, name, shown in sections if shown],
    }


def _cells(run: RunSummary) -> list[tuple[str, str]]:
    steps = f"{run.steps:,}" if run.is_finished else f"{run.steps:,}, not ended"
    values = []
    for name in OBJECTIVES:  # a column of the other's is empty, and is left out where it is so in all runs
        judged = run.judged if name == run.objective else Loss(None, None, None, None)
        values += [
            (metric_words(f"final_{name}"), number(judged.train)),
            (metric_words(f"eval_{name}"), number(judged.evaluation)),
            (f"best {name}, at step", "" if judged.best is None else f"{judged.best:.4f}, {judged.best_step:,}"),
        ]
    return [
        ("parameters", "" if run.parameters is None else f"{run.parameters:,}"),
        ("file", "" if run.adapter_bytes is None else byte_size(run.adapter_bytes)),
        ("steps", steps),
        *values,
        ("tokens/s", "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}"),
        ("peak memory", "" if run.memory_gib is None else byte_size(run.memory_gib * 2**30)),
        ("time", "" if run.wall_s is None else clock(run.wall_s)),
        ("machine", run.machine),
    ]


def _score_tables(comparison: Comparison) -> dict[str, list[dict[str, str]]]:
    tables: dict[str, list[dict[str, str]]] = {}
    for letter, name, run in zip(comparison.letters, comparison.short_names, comparison.runs, strict=True):
        for task, scores in run.scores.items():
            tables.setdefault(task, []).extend(_rows(letter, name, scores))
    for rows in tables.values():
        kinds = list(dict.fromkeys(row["score"] for row in rows))
        rows.sort(key=lambda row: kinds.index(row["score"]))  # stable: the runs in their order
    return tables


def _rows(letter: str, name: str, scores: dict[str, Score]) -> Iterator[dict[str, str]]:
    for kind, score in scores.items():
        is_share, paired = score.low is not None, score.over_first
        shown = (lambda value: f"{100 * value:.1f}") if is_share else (lambda value: f"{value:.3f}")
        signed = signed_percent if is_share else (lambda value: f"{value:+.3f}")
        row = {
            "letter": letter,
            "name": name,
            "score": {"acc_norm": "accuracy, length-normalized"}.get(kind, kind) + (", %" if is_share else ""),
            "n": f"{score.num_examples:,}",
            "before": "" if score.before is None else shown(score.before),
            "after": shown(score.value),
            "interval": f"{shown(score.low)} to {shown(score.high)}" if is_share else "",
            "change": "",
            "p": "",
        }
        if paired is not None:
            row["change"], row["common"] = signed(paired.difference), f"{paired.common:,}"
            row["change_interval"] = f"{signed(paired.low)} to {signed(paired.high)}"
            row["direction"] = direction(paired.low, paired.high)
            row["p"] = "" if paired.p is None else f"{paired.p:.2g}"
        yield row
