"""What README and GUIDE.md say of the frontier: which method has the lower loss at which size, and what was not run.

Every sentence follows from the verdicts of `frontier_verdicts`; without results the pages say that there are none.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.frontier_rows import OURS, ROWS, AdapterRow
from benchmarks.quality.frontier_scores import Score, Suite
from benchmarks.quality.frontier_verdicts import (
    LEAST_SEEDS,
    SIGNIFICANT,
    Frontier,
    Verdict,
    by_accuracy,
    compare,
    compared,
    corrected,
    load,
    over_lower,
)
from benchmarks.report.frontier_tables import (
    NAMES,
    chance,
    ends_text,
    heading,
    interval,
    label,
    picture,
    series,
    verdict_table,
)

NOTHING = (
    "Where LoRA of rank 1 fits, take LoRA; the two are for adapters smaller than that. How they compare with other "
)
NOTHING += "methods of those sizes has not been measured."
NOT_RUN = "Not run yet."


def main_suite(found: Frontier) -> Suite:
    """Return the suite that README shows: the one with the most sizes, and of those with the most rows."""
    return max(found.suites, key=lambda suite: (len({s.size for s in found.of(suite)}), len(found.of(suite))))


def readme(results: Path) -> str:
    """Return README's paragraph on what the small adapters are for, and its figure."""
    found = load(results)
    if not found.verdicts:
        return NOTHING
    about = (
        "The best of the two beside the best of all other methods, tuned alike, by the loss of held-out answers, at "
    )
    about += (
        "sizes from 5 thousand parameters to those of LoRA r=8, 2.4m ([by size](GUIDE.md#by-size); `lsr-scale plan "
    )
    about += "--budget` proposes by it):"
    shown = main_suite(found)
    figure = f"![held-out loss against trainable parameters](benchmarks/results/frontier/{picture(shown)})"
    return "\n\n".join([about, _listed(lines(found)), figure])


def guide(results: Path) -> str:
    """Return GUIDE.md's section: what was found, the comparisons, the figures."""
    found = load(results)
    if not found.scores:
        return NOT_RUN
    parts = []
    if found.verdicts:
        parts.append(_listed(lines(found)))
        parts.append("\n".join(verdict_table(found.verdicts)))
        parts.append(
            "p is of Student's distribution, of questions and seeds, corrected by Holm's method over the sizes of "
            "a model, kind of text and base; below 0.05 is a separation. Intervals are not corrected."
        )
        parts.append(ends_text(compared(found.scores)))
    parts += [line] if (line := beside_lora_8(found)) else []
    parts += [f"![{heading(suite)}](benchmarks/results/frontier/{picture(suite)})" for suite in found.suites]
    return "\n\n".join(parts)


def lines(found: Frontier) -> list[str]:
    """Return a suite's sentences: at which sizes which method's loss and accuracy are better, and what was not run."""
    texts = []
    for suite, group in itertools.groupby(found.verdicts, key=lambda one: one.ours.suite):
        verdicts = list(group)
        better = [(_name(one.ours if one.wins else one.theirs), one.ours.size) for one in verdicts if one.separates]
        text = f"{heading(suite)}: the lower loss has {_by_name(better)}"
        if even := [one.ours.size for one in verdicts if not one.separates]:
            text += f"; ours and the others do not separate at {_listed_in_words(even)}"
        if lower := _lower_still(found, verdicts):
            text += f"; lower still is {_by_name(lower, ours=False)}"
        if of_suite := by_accuracy(verdicts):
            pairs = [(v.ours if d.value > 0 else v.theirs, v.ours.size) for v, d, p in of_suite if p < SIGNIFICANT]
            ahead = _by_name([(_name(score), size) for score, size in pairs], ours=False)
            text += f". By accuracy {f'{ahead} is ahead; elsewhere they' if pairs else 'they'} do not separate"
        texts.append(f"{text}. {_left(found, suite)}")
    return texts


def _name(score: Score | AdapterRow) -> str:
    return NAMES[series(score)]


def _by_name(pairs: Iterable[tuple[str, str]], ours: bool = True) -> str:
    """Return at which sizes each name is, our methods first; with `ours` it is said where they are at none."""
    sizes: dict[str, list[str]] = {}
    for name, size in pairs:
        sizes.setdefault(name, []).append(size)
    first = [name for name in (NAMES[method] for method in OURS) if name in sizes]
    parts = [f"{name} at {_listed_in_words(sizes[name])}" for name in dict.fromkeys([*first, *sizes])]
    return "; ".join(parts if first or not ours else ["LSR-Adapt and Kron-LoRA at no size", *parts])


def _lower_still(found: Frontier, verdicts: Iterable[Verdict]) -> list[tuple[str, str]]:
    """Return by name and size the rows that are below both that are compared, and separate from the lower of them."""
    rows = []
    for one in verdicts:
        lower = min(one.ours, one.theirs, key=lambda s: s.nats)
        of_size = [s for s in compared(found.of(lower.suite)) if s.size == lower.size]
        rows += [(_name(other.theirs), lower.size) for other in over_lower(of_size)[lower.row] if other.separates]
    return list(dict.fromkeys(rows))


def _left(found: Frontier, suite: Suite) -> str:
    """Return in words which rows of a suite's sizes, of the methods that its base takes, have no seeds."""
    model, _, base = suite
    run = {(score.size, score.row): _name(score) for score in compared(found.of(suite))}  # in the order of sizes
    of_rates = {(row.size, row.row): row.tuned for row in found.rows_of(suite)}
    best = {one.ours.size: one.theirs.tuned for one in found.verdicts if one.ours.suite == suite}
    missing: list[tuple[str, str]] = []
    tuned: list[tuple[str, str]] = []
    open_: list[tuple[str, str]] = []
    for size in dict.fromkeys(size for size, _ in run):
        methods = {name for (of, _), name in run.items() if of == size}
        for row, adapter in ROWS[model][size].items():
            if not adapter.takes(base) or "+" in row or (size, row) in run:
                continue
            name = _name(adapter) + (" in another form" if _name(adapter) in methods else "")
            loss = of_rates.get((size, row))
            (missing if loss is None else tuned).append((name, size))
            if loss is not None and loss < best.get(size, -math.inf):
                open_.append((name, size))
    if not missing and not tuned:
        return "All rows were run."
    parts = [f"Not run: {_by_name(dict.fromkeys(missing), ours=False)}."] if missing else []
    if tuned:
        parts.append(f"Tuned, but not run with {LEAST_SEEDS} seeds: {_by_name(dict.fromkeys(tuned), ours=False)}")
        parts[-1] += f"; by that the best of the others would be {_by_name(open_, ours=False)}." if open_ else "."
    return " ".join(parts)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _listed_in_words(words: Sequence[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def beside_lora_8(found: Frontier) -> str:
    """Return how far LSR-Adapt at a quarter of LoRA r=8's parameters is from it, where both were measured."""
    pairs = []
    for suite in found.suites:
        mine = compared(found.of(suite))
        lsr = min((s for s in mine if (s.method, s.size) == ("lsr", "600k")), key=lambda s: s.tuned, default=None)
        lora = next((s for s in mine if (s.row, s.size) == ("lora", "2.4m")), None)
        if lsr is not None and lora is not None:
            pairs.append(compare(lsr, lora))
    texts = []
    for one in corrected(pairs):
        share = f"{100 * one.ours.parameters / one.theirs.parameters:.0f} % of LoRA r=8's parameters"
        p = chance(one.corrected_p) if one.corrected_p < 1e-4 else f"= {chance(one.corrected_p)}"
        words = f"{heading(one.ours.suite)}: {label(one.ours)}, with {share}, less LoRA r=8"
        texts.append(f"{words}: {interval(one)} nats a token, p {p}")
    return "; ".join(texts) + ("." if texts else "")
