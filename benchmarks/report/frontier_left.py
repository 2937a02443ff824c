"""What GUIDE.md says of rows that are not compared: not run, tuned only, with a seed that diverged."""

from collections.abc import Iterable

from benchmarks.quality.frontier_rows import ROWS
from benchmarks.quality.frontier_scores import LEAST_SEEDS, Row, Suite, key_of
from benchmarks.quality.frontier_verdicts import Frontier, compared
from benchmarks.report.frontier_names import by_name, label, listed, name

Pairs = list[tuple[str, str]]  # what a row is called, and its size


def left(found: Frontier, suite: Suite) -> str:
    """Return in words which rows of a suite's sizes are not compared, and why."""
    model, _, base = suite
    rows = {(row.size, row.row): row for row in found.rows_of(suite)}
    run = {(score.size, score.row) for score in compared(found.of(suite))}
    missing: Pairs = []
    tuned: Pairs = []
    diverged: Pairs = []
    refused: list[str] = []  # what methods are called that do not take the base
    variants: list[bool] = []  # whether each was run
    for size, adapters in ROWS[model].items():
        names = {name(row, row.row) for row in rows.values() if (row.size, row.row) in run and row.size == size}
        for row_name, adapter in adapters.items():
            if not adapter.takes(base):
                refused += [name(adapter, row_name)] if any(of == size for of, _ in rows) else []
                continue
            if "+" in row_name:
                variants.append((size, row_name) in run)
            called = name(adapter, row_name)
            pair = called + (" in another form" if called in names else ""), size
            row = rows.get((size, row_name))
            if (size, row_name) in run:
                continue
            if row is not None:
                (diverged if row.diverged else tuned).append(pair)
            elif "+" not in row_name and any(of == size for of, _ in rows):
                missing.append(pair)
    empty = [size for size in ROWS[model] if not any(of == size for of, _ in rows)]
    would = found.would_be_best(suite)
    parts: list[str] = []
    if missing:
        parts.append(f"Not run: {by_name(dict.fromkeys(missing), ours=False)}.")
    if refused:
        parts.append(f"{listed(list(dict.fromkeys(refused)))} takes no base in {base}.")
    if empty:
        parts.append(f"No row was run at {listed(empty)}.")
    if tuned:
        text = f"Tuned, but not run with {LEAST_SEEDS} seeds: {by_name(dict.fromkeys(tuned), ours=False)}"
        parts.append(f"{text}{_would(row for row in would if not row.diverged)}.")
    if diverged:
        text = f"Not compared, as a seed diverged: {by_name(dict.fromkeys(diverged), ours=False)}"
        parts.append(f"{text}{_would(row for row in would if row.diverged)}.")
    if worse := [(name(score, score.row), score.size) for score in found.of(suite) if score.worse_than_base]:
        ended = by_name(dict.fromkeys(worse), ours=False)
        parts.append(f"Compared, though a seed ended with more loss than the base alone has: {ended}.")
    if others := _at_other_rates(found, suite):
        parts.append(
            f"Seeds at another rate than the one that is compared are not counted: {by_name(others, ours=False)}."
        )
    if not (missing or empty or tuned or diverged):
        parts.append("All rows were run." if all(variants) else "All rows with the plain start and AdamW were run.")
    if not all(variants):
        some = f"Of {len(variants)} rows with another start or optimizer {sum(variants)} were run."
        parts.append(some if any(variants) else "No row with another start or optimizer was run.")
    return " ".join(parts)


def _would(rows: Iterable[Row]) -> str:
    """Return which rows would be the best of their side; nothing of none."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault("ours" if row.is_ours else "the others", []).append(f"{label(row)} at {row.size}")
    sides = [f"the best of {side} would be {listed(of_side)}" for side, of_side in texts.items()]
    return f"; by the held-out part {'; '.join(sides)}" if sides else ""


def _at_other_rates(found: Frontier, suite: Suite) -> Pairs:
    keys = dict.fromkeys(key_of(found.done[trial]) for trial in found.at_other_rates)
    rows = [(ROWS[suite[0]][size].get(row), row, size) for of, size, row in keys if of == suite]
    return list(dict.fromkeys((name(adapter, row), size) for adapter, row, size in rows if adapter is not None))
