"""A run's `metrics.jsonl`: read, cut back to a checkpoint's step, summarized."""

import json
import math
import re
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.config.training import EVALUATED


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a line that is no step's, such as one that a kill cut short, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave in a file of rows those up to a step, since the later steps are done again; return them."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def numbers_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return the values of a column where they are finite numbers."""
    values = [row.get(name) for row in rows]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def summarize_metrics(path: Path, best: int | None = None) -> dict[str, Any]:
    """Return what the results say of a metrics file.

    The loss at the end (mean of the last tenth), tokens, memory, and the largest condition number of each side.

    Args:
        path: The file.
        best: The step whose adapter was taken; None is the last one's.
    """
    rows = read_metrics(path)
    steps = [row for row in rows if numbers_of([row], "loss")]
    if not steps:
        return {}
    last = numbers_of(steps[-max(1, len(steps) // 10) :], "loss")
    speeds = sorted(numbers_of(steps, "tokens_per_s"))
    evaluations = [row for row in rows if "eval_loss" in row and best in (None, row["step"])]
    tokens = numbers_of(steps[-1:], "num_tokens") or numbers_of(steps[-1:], "num_input_tokens_seen")
    found: dict[str, Any] = {
        "final_loss": round(sum(last) / len(last), 4),
        "tokens": round(tokens[-1]) if tokens else 0,
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "peak_memory_gib": max(numbers_of(steps, "memory_gib"), default=None),
    }
    for name in dict.fromkeys(name for row in steps for name in row if re.fullmatch("condition_.*_max", name)):
        if values := numbers_of(steps, name):
            found[name] = round(max(values), 4)
    if best is not None:
        found["best_step"] = best
    return found | {name: round(values[0], 6) for name in EVALUATED if (values := numbers_of(evaluations[-1:], name))}
