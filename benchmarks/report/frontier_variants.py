"""What each start and optimizer brought: a row of the frontier with it, less the same row without, at the same size."""

import itertools
from pathlib import Path

from benchmarks.quality.frontier_scores import Suite
from benchmarks.quality.frontier_verdicts import Frontier, Verdict, compared, load, variants
from benchmarks.report.frontier_names import VARIANT_NAMES, heading, label, variant
from benchmarks.report.frontier_tables import chance, interval
from benchmarks.report.markdown import grid


def section(results: Path) -> list[str]:
    """Return the page's part in Markdown: every comparison with its interval; nothing without results."""
    found = load(results)
    verdicts = variants(found.scores)
    if not verdicts:
        return []
    lines = [
        "| model, texts, base | size | row | start, optimizer | difference, nats a token (95 %) | p, corrected | |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for one in verdicts:
        cells = (heading(one.ours.suite), one.ours.size, label(one.theirs), variant(one.ours.row), interval(one))
        lines.append(f"| {' | '.join([*cells, chance(one.corrected_p), _outcome(one)])} |")
    about = (
        "Each less the same row with the plain start and AdamW, in nats a token of the test part (below 0 better). p "
    )
    about += "is corrected by Holm's method over these comparisons of a model, kind of text and base."
    parts = ["### What starts and optimizers brought", about, "\n".join(lines)]
    rows = [row for row in found.rows if row.diverged and "+" in row.row]
    lost = [f"{label(row)} at {row.size} ({heading(row.suite)})" for row in rows]
    return [*parts, f"A seed diverged, and the row is not compared: {'; '.join(lost)}."] if lost else parts


def guide(results: Path) -> str:
    """Return GUIDE.md's table a model, kind of text and base: rows by start and optimizer; nothing without results."""
    found = load(results)
    parts = []
    for suite, group in itertools.groupby(variants(found.scores), key=lambda one: one.ours.suite):
        verdicts = list(group)
        lost = {(row.size, row.row) for row in found.rows_of(suite) if row.diverged}
        names = [name for name in VARIANT_NAMES if any(one.ours.row.endswith(f"+{name}") for one in verdicts)]
        cells = {(one.ours.size, one.ours.row): _cell(one) for one in verdicts} | dict.fromkeys(lost, "diverged")
        plain = {(one.theirs.size, one.theirs.row): label(one.theirs) for one in verdicts}
        rows = [
            [f"{called} at {size}", *(cells.get((size, f"{row}+{name}"), "") for name in names)]
            for (size, row), called in plain.items()
        ]
        about = f"{heading(suite)}: what each brought, in nats a token of held-out answers, less the same row with the "
        about += "plain start and AdamW (below 0 better; bold: separates, corrected for the table)."
        parts += [about, grid(["", *(VARIANT_NAMES[name] for name in names)], rows)]
        parts += [text] if (text := _left(found, suite)) else []
    return "\n\n".join(parts)


def _left(found: Frontier, suite: Suite) -> str:
    """Return which rows with another start or optimizer were tuned alone, and what they lost; and which have no row."""
    rows = {(row.size, row.row): row for row in found.rows_of(suite)}
    run = {(score.size, score.row) for score in compared(found.of(suite))}
    tuned, tried = [], set()
    for (size, row_name), row in rows.items():
        plain_name, _, changed = row_name.partition("+")
        tried.add(changed)
        plain = rows.get((size, plain_name))
        if changed and (size, row_name) not in run and not row.diverged and plain is not None:
            tuned.append(f"{label(row)} at {size} {row.tuned:.4f}, plain {plain.tuned:.4f}")
    never = [text for name, text in VARIANT_NAMES.items() if name not in tried]
    parts = [f"Tuned alone, of one seed, on the part that rates are chosen on: {'; '.join(tuned)}."] if tuned else []
    parts += [f"Tried with no row: {'; '.join(never)}."] if never else []
    return " ".join(parts)


def _cell(one: Verdict) -> str:
    return f"**{one.difference:+.4f}**" if one.separates else f"{one.difference:+.4f}"


def _outcome(one: Verdict) -> str:
    return "no separation" if not one.separates else "better" if one.wins else "worse"
