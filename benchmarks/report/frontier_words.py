"""What README and GUIDE.md say of the frontier: which method has the lower loss at which size.

Every sentence follows from the verdicts of `frontier_verdicts`; `frontier_left` says which rows those are without.
Without results the pages say that there are none.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.frontier_rows import LORA_8, MODEL_NAMES, SIZES, target
from benchmarks.quality.frontier_scores import Score, Suite
from benchmarks.quality.frontier_verdicts import (
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
from benchmarks.report.frontier_left import left
from benchmarks.report.frontier_names import by_name, heading, label, listed, name
from benchmarks.report.frontier_tables import chance, ends_text, interval, picture, verdict_table

NOTHING = (
    "Where LoRA of rank 1 fits, take LoRA; the two are for adapters smaller than that. How they compare with other "
)
NOTHING += "methods of those sizes has not been measured."
NOT_RUN = "Not run yet."
RANK_ONE = "300k"  # the size of LoRA r=1 on all linears


def main_suite(found: Frontier) -> Suite:
    """Return the suite that README shows: the one with the most sizes, and of those with the most rows."""
    return max(found.suites, key=lambda suite: (len({s.size for s in found.of(suite)}), len(found.of(suite))))


def readme(results: Path) -> str:
    """Return README's paragraph on what the small adapters are for: who is ahead at which size, and the figure."""
    found = load(results)
    if not found.verdicts:
        return NOTHING
    parts = [" ".join(filter(None, (below_rank_one(found.verdicts), from_rank_one(found.verdicts))))]
    parts += [
        "Who is ahead at which size: the best of the two, or the best of those other methods that were run, all tuned "
        "alike ([by size](GUIDE.md#by-size): by how much, and what was not run; "
        f"`lsr-scale plan --budget` proposes by it){_shares(found)}:",
        "\n".join(size_table(found)),
        "In bold: one of the two. Even: they do not separate. *: a row that was not compared, or a seed that was lost, "
        f"may change it. {_by_accuracy(found)}",
    ]
    figure = f"benchmarks/results/frontier/{picture(main_suite(found))}"
    parts.append(f"![held-out loss against trainable parameters]({figure})")
    return "\n\n".join(parts)


def size_table(found: Frontier) -> list[str]:
    """Return a table in Markdown: a line a suite, the one with the most sizes first, a column a size."""
    rows = {suite: _by_size(found, suite) for suite in found.suites}
    sizes = [size for size in SIZES if any(size in of_suite for of_suite in rows.values())]
    table = [f"| trained parameters | {' | '.join(sizes)} |", f"| --- |{' :---: |' * len(sizes)}"]
    for suite in sorted(rows, key=lambda one: -len(rows[one])):
        if rows[suite]:
            table.append(f"| {heading(suite)} | {' | '.join(rows[suite].get(size, '') for size in sizes)} |")
    return table


def _by_size(found: Frontier, suite: Suite) -> dict[str, str]:
    """Return who is ahead at each size that is compared."""
    open_sizes = {row.size for row in found.would_be_best(suite)}
    cells = {}
    for one in found.verdicts:
        if one.ours.suite != suite:
            continue
        ahead = one.ours if one.wins else one.theirs
        cell = "even" if not one.separates else name(ahead, ahead.row)
        cell = f"**{cell}**" if one.wins else cell
        lost = one.ours.worse_than_base or one.theirs.worse_than_base
        below = [row for row in _lower_still(found, [one]) if row.is_ours != ahead.is_ours]
        cells[one.ours.size] = cell + ("*" if one.ours.size in open_sizes or lost or below else "")
    return cells


def _by_accuracy(found: Frontier) -> str:
    """Return who is ahead by accuracy, of texts with choices; nothing without any."""
    known, ahead = [], []
    for suite in found.suites:
        for one, difference, p in by_accuracy([v for v in found.verdicts if v.ours.suite == suite]):
            known.append(one)
            better = one.ours if difference.value > 0 else one.theirs
            ahead += [f"{label(better)} ({heading(suite)})"] if p < SIGNIFICANT else []
    if not known:
        return ""
    return f"By accuracy {f'{listed(ahead)} is ahead; elsewhere they' if ahead else 'they'} separate nowhere."


def below_rank_one(verdicts: Sequence[Verdict]) -> str:
    """Return in how many comparisons below the size of LoRA of rank 1 one of the two is better; nothing without any."""
    small = [one for one in verdicts if SIZES[one.ours.size] < SIZES[RANK_ONE]]
    if not small:
        return ""
    gains = [-one.difference for one in small if one.wins]
    text = "At sizes below that of LoRA of rank 1 one of the two has the lower loss of held-out answers in "
    if not gains:
        return f"{text}none of {len(small)} comparisons."
    by = f"{min(gains):.3f} to {max(gains):.3f}" if len(gains) > 1 else f"{gains[0]:.3f}"
    return f"{text}{len(gains)} of {len(small)} comparisons, by {by} nats a token."


def from_rank_one(verdicts: Sequence[Verdict]) -> str:
    """Return whether one of the two is better where LoRA of rank 1 fits; nothing where that was not compared."""
    large = [one for one in verdicts if SIZES[one.ours.size] >= SIZES[RANK_ONE]]
    if not large:
        return ""
    where = f"Where LoRA of rank 1 fits, from {RANK_ONE} on, "
    wins = [f"{label(one.ours)} at {one.ours.size} ({heading(one.ours.suite)})" for one in large if one.wins]
    if not wins:
        return f"{where}neither of the two was better at any size: take LoRA, which is just as fast here."
    return f"{where}the lower loss has {listed(wins)}; elsewhere take LoRA, which is just as fast here."


def _shares(found: Frontier) -> str:
    """Return what sizes are on other models than the one that they are named by."""
    text = ""
    for model in dict.fromkeys(one.ours.suite[0] for one in found.verdicts):
        if LORA_8[model] != LORA_8["smollm2"]:
            sizes = (one.ours.size for one in found.verdicts if one.ours.suite[0] == model)
            size = min(sizes, key=lambda of: SIZES[of])
            text += f". Sizes are SmolLM2-135M's, on {MODEL_NAMES[model]} the same shares of LoRA r=8's: {size} is "
            text += f"{target(model, size):,.0f}"
    return text


def guide(results: Path) -> str:
    """Return GUIDE.md's section: what was found, the comparisons, the figures."""
    found = load(results)
    told = lines(found)
    if not found.scores and not told:
        return NOT_RUN
    parts = [_listed(told)] if told else []
    if found.verdicts:
        parts.append("\n".join(verdict_table(found)))
        parts.append(
            "p is of Student's distribution, of questions and seeds, corrected by Holm's method over the sizes of "
            "a model, kind of text and base; below 0.05 is a separation. Intervals are not corrected."
        )
        parts.append(f"{spread_text(found)} {ends_text(compared(found.scores))}")
    parts += [line] if (line := beside_lora_8(found)) else []
    parts += [f"![{heading(suite)}](benchmarks/results/frontier/{picture(suite)})" for suite in found.suites]
    return "\n\n".join(parts)


def lines(found: Frontier) -> list[str]:
    """Return a suite's sentences: at which sizes which method's loss and accuracy are better, and what was not run.

    A suite has some once rows of both sides are compared at a size, or a seed of a row diverged.
    """
    texts = []
    for suite in dict.fromkeys(row.suite for row in found.rows):
        verdicts = [one for one in found.verdicts if one.ours.suite == suite]
        if verdicts or any(row.diverged for row in found.rows_of(suite)):
            texts.append(f"{heading(suite)}: {_compared(found, suite, verdicts)}. {left(found, suite)}")
    return texts


def _compared(found: Frontier, suite: Suite, verdicts: Sequence[Verdict]) -> str:
    tried = [row for row in found.rows_of(suite) if row.diverged] + compared(found.of(suite))
    alone = [size for size in SIZES if size in {row.size for row in tried} - {one.ours.size for one in verdicts}]
    text = f"nothing is compared at {listed(alone)}, where a side has no row to compare" if alone else ""
    if not verdicts:
        return text
    better = [(one.ours if one.wins else one.theirs) for one in verdicts if one.separates]
    parts = [f"the lower loss has {by_name([(name(score, score.row), score.size) for score in better])}"]
    if even := [one.ours.size for one in verdicts if not one.separates]:
        parts.append(f"ours and the others do not separate at {listed(even)}")
    if lower := _lower_still(found, verdicts):
        them = by_name([(label(score), score.size) for score in lower], ours=False)
        parts.append(f"these were chosen on the held-out part; on the test part lower still: {them}")
    text = "; ".join([*parts, *([text] if text else [])])
    if of_suite := by_accuracy(verdicts):
        ahead = [(v.ours if d.value > 0 else v.theirs) for v, d, p in of_suite if p < SIGNIFICANT]
        names = by_name([(name(score, score.row), score.size) for score in ahead], ours=False)
        text += f". By accuracy {f'{names} is ahead; elsewhere they' if ahead else 'they'} do not separate"
    return text


def _lower_still(found: Frontier, verdicts: Iterable[Verdict]) -> list[Score]:
    """Return the rows that are below both that are compared, and separate from the lower of them."""
    rows = []
    for one in verdicts:
        lower = min(one.ours, one.theirs, key=lambda s: s.nats)
        of_size = [s for s in compared(found.of(lower.suite)) if s.size == lower.size]
        rows += [other.theirs for other in over_lower(of_size)[lower.row] if other.separates]
    return rows


def spread_text(found: Frontier) -> str:
    """Return by how much rows of a size differ in their parameters at most."""
    counts: dict[tuple[Suite, str], list[int]] = {}
    for score in compared(found.scores):
        counts.setdefault((score.suite, score.size), []).append(score.parameters)
    most = max(max(of_size) / min(of_size) - 1 for of_size in counts.values())
    return f"Rows of a size differ in their parameters by up to {100 * most:.0f} %."


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


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
