"""What README and GUIDE.md say of the frontier: where LSR-Adapt or Kron-LoRA is the best method at its size, or is not.

Every sentence follows from the verdicts of `frontier_verdicts`; without results the pages say that there are none.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.frontier_verdicts import Frontier, Suite, Verdict, compare, compared, corrected, load
from benchmarks.report.frontier_tables import heading, interval, label, outcome, picture, verdict_table
from benchmarks.report.markdown import grid

NOTHING = (
    "Where LoRA of rank 1 fits, take LoRA; the two are for adapters smaller than that. How they compare with other "
)
NOTHING += "methods of those sizes has not been measured."
NOT_RUN = "Not run yet."


def main_suite(found: Frontier) -> Suite:
    """Return the suite that README shows: the one with the most sizes, and of those with the most rows."""
    return max(found.suites, key=lambda suite: (len({s.size for s in found.of(suite)}), len(found.of(suite))))


def readme(results: Path) -> str:
    """Return README's paragraph on what the small adapters are for, its table and its figure."""
    found = load(results)
    if not found.verdicts:
        return NOTHING
    shown = main_suite(found)
    head = [
        "parameters",
        "best of LSR-Adapt and Kron-LoRA",
        "best of the others",
        "difference, nats a token (95 %)",
        "",
    ]
    rows = [
        [one.ours.size, label(one.ours), label(one.theirs), interval(one), outcome(one)]
        for one in found.verdicts
        if one.ours.suite == shown
    ]
    about = "By the loss of held-out answers, all methods tuned alike ([by size](GUIDE.md#by-size); "
    about += "`lsr-scale plan --budget` proposes by it):"
    parts = [about, "\n".join(f"- {line}" for line in lines(found.verdicts))]
    if rows:
        parts += [f"{heading(shown)}; less than 0: LSR-Adapt or Kron-LoRA lost less:", grid(head, rows)]
    parts.append(f"![held-out loss against trainable parameters](benchmarks/results/frontier/{picture(shown)})")
    return "\n\n".join(parts)


def guide(results: Path) -> str:
    """Return GUIDE.md's section: what was found, the comparisons, the figures."""
    found = load(results)
    if not found.scores:
        return NOT_RUN
    parts = []
    if found.verdicts:
        parts.append("\n".join(f"- {line}" for line in lines(found.verdicts)))
        parts.append("\n".join(verdict_table(found.verdicts)))
        parts.append(
            "p is of a paired bootstrap, corrected by Holm's method over this table; below 0.05 is a separation."
        )
    parts += [line] if (line := beside_lora_8(found)) else []
    parts += [f"![{heading(suite)}](benchmarks/results/frontier/{picture(suite)})" for suite in found.suites]
    return "\n\n".join(parts)


def lines(found: Sequence[Verdict]) -> list[str]:
    """Return a sentence a suite: at which sizes LSR-Adapt or Kron-LoRA is the best method, at which it is not."""
    texts = []
    for suite, group in itertools.groupby(found, key=lambda one: one.ours.suite):
        ours, theirs, even = _sorted(list(group))
        parts = [f"LSR-Adapt or Kron-LoRA is the best method at {_sizes(ours) if ours else 'no measured size'}"]
        parts += [f"another one is at {_sizes(theirs)}"] if theirs else []
        parts += [f"the best of both kinds do not separate at {_sizes(even)}"] if even else []
        texts.append(f"{heading(suite)}: {'; '.join(parts)}.")
    return texts


def _sizes(found: Iterable[Verdict]) -> str:
    *before, last = [one.ours.size for one in found]
    return f"{', '.join(before)} and {last}" if before else last


def _sorted(found: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict], list[Verdict]]:
    """Return where ours is the best, where another is, and where they do not separate."""
    ours = [one for one in found if one.wins]
    theirs = [one for one in found if one.separates and not one.wins]
    return ours, theirs, [one for one in found if not one.separates]


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
