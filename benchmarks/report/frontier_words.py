"""What README and GUIDE.md say of the frontier: which method has the lowest loss at which size, and what was not run.

Every sentence follows from the verdicts of `frontier_verdicts`; without results the pages say that there are none.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.frontier_rows import ROWS
from benchmarks.quality.frontier_verdicts import Frontier, Suite, compare, compared, corrected, load
from benchmarks.report.frontier_tables import NAMES, heading, interval, label, picture, series, verdict_table

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
    about = "By the loss of held-out answers, all methods tuned alike, at sizes from 5 thousand parameters to those of "
    about += "LoRA r=8, 2.4m ([by size](GUIDE.md#by-size); `lsr-scale plan --budget` proposes by it):"
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
            "p is of a paired bootstrap, corrected by Holm's method over this table; below 0.05 is a separation."
        )
    parts += [line] if (line := beside_lora_8(found)) else []
    parts += [f"![{heading(suite)}](benchmarks/results/frontier/{picture(suite)})" for suite in found.suites]
    return "\n\n".join(parts)


def lines(found: Frontier) -> list[str]:
    """Return a sentence a suite: at which sizes which method has the lowest loss, and which rows were not run."""
    texts = []
    for suite, group in itertools.groupby(found.verdicts, key=lambda one: one.ours.suite):
        best: dict[str, list[str]] = {}
        even = []
        for one in group:
            if one.separates:
                best.setdefault(NAMES[series(one.ours if one.wins else one.theirs)], []).append(one.ours.size)
            else:
                even.append(one.ours.size)
        first = [name for name in (NAMES["lsr"], NAMES["kron_lora"]) if name in best]
        parts = [f"{name} at {_listed_in_words(best[name])}" for name in [*first, *(n for n in best if n not in first)]]
        if not first:
            parts = ["LSR-Adapt and Kron-LoRA at no size", *parts]
        text = f"{heading(suite)}: the lowest loss has {'; '.join(parts)}"
        if even:
            text += f"; ours and the others do not separate at {_listed_in_words(even)}"
        left = _not_run(found, suite)
        texts.append(f"{text}. {f'Not run: {left}.' if left else 'All rows were run.'}")
    return texts


def _not_run(found: Frontier, suite: Suite) -> str:
    """Return in words what the sizes of a suite lack of the methods that its base takes."""
    model, _, base = suite
    run = {(score.size, score.row): series(score) for score in compared(found.of(suite))}  # in the order of sizes
    left: dict[str, list[str]] = {}
    for size in dict.fromkeys(size for size, _ in run):
        methods = {method for (of, _), method in run.items() if of == size}
        for name, row in ROWS[model][size].items():
            if row.takes(base) and "+" not in name and (size, name) not in run:
                form = " in another form" if series(row) in methods else ""
                sizes = left.setdefault(NAMES[series(row)] + form, [])
                sizes += [size] if size not in sizes else []
    return "; ".join(f"{name} at {_listed_in_words(sizes)}" for name, sizes in left.items())


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
        words = f"{heading(one.ours.suite)}: {label(one.ours)}, with {share}, less LoRA r=8"
        texts.append(f"{words}: {interval(one)} nats a token, p = {one.corrected_p:.2g}")
    return "; ".join(texts) + ("." if texts else "")
