"""A run's `metrics.jsonl`: read, truncated to a checkpoint's step, summarized."""

import json
import math
import re
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.config.training import EVALUATED


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a line that is no step's, such as one that a kill cut short, is skipped."""
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
    """Drop what a resumed run repeats from a file: rows after a step, and those after training; return what is left."""
    rows = [row for row in read_metrics(path) if row["step"] <= step and row.get("moment") != "after"]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def finite_values(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return the values of a column where they are finite numbers."""
    values = [row.get(name) for row in rows]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def summarize_metrics(path: Path, best: int | None = None) -> dict[str, Any]:
    """Return what the results say of a metrics file.

    The loss at the end (mean of the last tenth), of GRPO the reward too, tokens, memory, the largest condition number
    of each side, and the largest shares of underflow in 8 bits.

    Args:
        path: The file.
        best: The step whose adapter was kept; None is the last one's.
    """
    rows = read_metrics(path)
    steps = [row for row in rows if finite_values([row], "loss")]
    if not steps:
        return {}
    last, rewards = (finite_values(steps[-max(1, len(steps) // 10) :], name) for name in ("loss", "reward"))
    speeds = sorted(finite_values(steps, "tokens_per_s"))
    evaluations = [row for row in rows if "eval_loss" in row and best in (None, row["step"])]
    tokens = finite_values(steps[-1:], "num_tokens") or finite_values(steps[-1:], "num_input_tokens_seen")
    shares = sorted(finite_values(steps, "mfu"))
    summary: dict[str, Any] = {
        "final_loss": round(sum(last) / len(last), 4),
        "tokens": round(tokens[-1]) if tokens else 0,
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        **({"final_reward": round(sum(rewards) / len(rewards), 4)} if rewards else {}),
        **({"mfu": shares[len(shares) // 2]} if shares else {}),
        "peak_memory_gib": max(finite_values(steps, "memory_gib"), default=None),
    }
    for name in dict.fromkeys(name for row in steps for name in row if re.fullmatch("condition_.*_max", name)):
        if values := finite_values(steps, name):
            summary[name] = round(max(values), 4)
    for name in dict.fromkeys(name for row in steps for name in row if re.fullmatch("underflow_.*_max", name)):
        if values := finite_values(steps, name):
            summary[name] = float(f"{max(values):.4g}")
    if best is not None:
        summary["best_step"] = best
    for name in EVALUATED:
        if values := finite_values(evaluations[-1:], name):
            summary[name] = round(values[0], 6)
    return summary
