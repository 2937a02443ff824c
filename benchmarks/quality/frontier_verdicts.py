"""What the frontier's trials say: means with errors, and paired comparisons corrected for how many there are.

A row's score is the nats a token of the test part's answers, over all answers and seeds. Its seeds are those at the
rate that lost least where rates are chosen, or a lower one where seeds were lost at that (`frontier_scores.py`).
The standard error of a score, and the interval and p of a difference between two rows, are of questions, which are the
same for both, and of seeds, which are each row's own; as seeds are few, by Student's distribution (`estimates.py`).
Which rows are compared at a size is decided on the part that rates were chosen on: the best of LSR-Adapt and Kron-LoRA,
and the best of the others, of rows with two seeds or more. p is corrected by Holm's method over the comparisons of a
suite, one a size (Holm 1979, Scandinavian Journal of Statistics 6, 65-70): what is claimed is claimed of one model, one
kind of text and one way to hold the base, and another suite adds no chance to be wrong about this one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import estimates, trials
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.frontier_rows import SIZES
from benchmarks.quality.frontier_scores import LEAST_SEEDS, Results, Row, Score, Suite, chosen_rates, rows, seeds
from benchmarks.quality.rate_trials import best_rate, is_at_end
from benchmarks.quality.trials import TUNING_SEED

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One row beside another; `estimate` is the first less the second, in nats a token."""

    ours: Score
    theirs: Score
    estimate: Estimate
    corrected_p: float = math.nan

    @property
    def difference(self) -> float:
        """The first less the second."""
        return self.estimate.value

    @property
    def accuracy(self) -> Estimate | None:
        """The first's accuracy less the second's; None for texts without choices."""
        if self.ours.right is None or self.theirs.right is None:
            return None
        return estimates.difference(self.ours.right, self.theirs.right, np.ones(self.ours.right.shape[1]))

    @property
    def separates(self) -> bool:
        """Whether they differ after the correction."""
        return self.corrected_p < SIGNIFICANT

    @property
    def wins(self) -> bool:
        """Whether the first is lower, and separated after the correction."""
        return self.difference < 0 and self.separates


@dataclasses.dataclass
class Frontier:
    """A folder's trials, and what they say."""

    done: Results

    @functools.cached_property
    def rows(self) -> list[Row]:
        """All rows that were tuned, by model, text, base, size and row."""
        return rows(self.done)

    @functools.cached_property
    def scores(self) -> list[Score]:
        """Those that have a seed on the test part, none of which diverged."""
        return [row for row in self.rows if isinstance(row, Score)]

    @functools.cached_property
    def suites(self) -> list[Suite]:
        """The suites that have a row on the test part."""
        return list(dict.fromkeys(score.suite for score in self.scores))

    def rows_of(self, suite: Suite) -> list[Row]:
        """Return a suite's rows, those without a score too."""
        return [row for row in self.rows if row.suite == suite]

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """The best of ours beside the best of the others, at each size that has both; of a suite corrected together."""
        return verdicts(self.scores)

    @functools.cached_property
    def diverged(self) -> list[str]:
        """The names of seeds that diverged at the best rate of their row."""
        kept = {id(result) for results in self._seeds[0].values() for result in results}
        return [name for name, result in self.done.items() if id(result) in kept and result["nll"] is None]

    @functools.cached_property
    def at_other_rates(self) -> list[str]:
        """The names of seeds that were trained at a rate that is not the best of their row, and are not counted."""
        return self._seeds[1]

    @functools.cached_property
    def _seeds(self) -> tuple[dict[Any, list[dict[str, Any]]], list[str]]:
        return seeds(self.done, chosen_rates(self.done))

    def would_be_best(self, suite: Suite) -> list[Row]:
        """Return the rows of a suite that would be the best of their side at a size, had they seeds to be compared by.

        They lost less than all that are compared on the part that rates are chosen on; of their own seeds one diverged,
        or there are too few.
        """
        names = {(score.size, score.row) for score in compared(self.of(suite))}
        found = []
        for _, group in itertools.groupby(sorted(self.rows_of(suite), key=_side), key=_side):
            best = min(group, key=lambda row: (row.tuned, (row.size, row.row) not in names))
            if (best.size, best.row) not in names and math.isfinite(best.tuned):
                found.append(best)
        return found

    def of(self, suite: Suite) -> list[Score]:
        """Return a suite's rows that have a score."""
        return [score for score in self.scores if score.suite == suite]

    def base(self, suite: Suite) -> dict[str, Any]:
        """Return what the base alone makes of a suite's test part."""
        return self.done["-".join(suite) + "-base-test"]


def _side(row: Row) -> tuple[int, bool]:
    return SIZES[row.size], not row.is_ours


def load(results: Path) -> Frontier:
    """Return what is in a folder of results; the same object as long as its file stays as it is."""
    file = results / trials.FILE
    state = file.stat() if file.is_file() else None
    return _loaded(results, None if state is None else (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=2)
def _loaded(results: Path, state: Any) -> Frontier:
    return Frontier(trials.load(results))


def compare(ours: Score, theirs: Score) -> Verdict:
    """Return the difference of two rows of a suite, its p not corrected."""
    return Verdict(ours, theirs, estimates.difference(ours.losses, theirs.losses, ours.tokens))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number."""
    corrected, before = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        before = max(before, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = before
    return corrected


def corrected(found: Sequence[Verdict]) -> list[Verdict]:
    """Return comparisons with their p corrected for how many they are."""
    values = holm([verdict.estimate.p for verdict in found])
    return [dataclasses.replace(verdict, corrected_p=p) for verdict, p in zip(found, values, strict=True)]


def verdicts(scores: Sequence[Score]) -> list[Verdict]:
    """Return one comparison a size that has rows of both kinds, those of a model, text and base corrected together."""
    found = []
    for _, group in itertools.groupby(scores, key=lambda s: (s.suite, s.size)):
        of_size = compared(group)
        ours, theirs = (
            min((s for s in of_size if s.is_ours == mine), key=lambda s: s.tuned, default=None)
            for mine in (True, False)
        )
        if ours is not None and theirs is not None:
            found.append(compare(ours, theirs))
    return by_suite(found)


def by_suite(found: Iterable[Verdict]) -> list[Verdict]:
    """Return comparisons with their p corrected for how many there are of their suite, which come together."""
    return [
        one for _, group in itertools.groupby(found, key=lambda one: one.ours.suite) for one in corrected(list(group))
    ]


def variants(scores: Iterable[Score]) -> list[Verdict]:
    """Return each row with another start or optimizer beside the same row without; a suite's are a family of their own.

    First is the row with it, so that a difference below 0 is what it brought.
    """
    rows = compared(scores)
    plain = {(score.suite, score.size, score.row): score for score in rows}
    pairs = [(score, plain.get((score.suite, score.size, score.row.partition("+")[0]))) for score in rows]
    return by_suite(compare(score, other) for score, other in pairs if other is not None and other is not score)


def by_accuracy(found: Sequence[Verdict]) -> list[tuple[Verdict, Estimate, float]]:
    """Return a suite's comparisons with the difference of their accuracies and its p, corrected for their number."""
    pairs = [(one, one.accuracy) for one in found]
    known = [(one, accuracy) for one, accuracy in pairs if accuracy is not None]
    values = holm([accuracy.p for _, accuracy in known])
    return [(one, accuracy, p) for (one, accuracy), p in zip(known, values, strict=True)]


def compared(scores: Iterable[Score]) -> list[Score]:
    """Return the rows that have seeds enough to be compared."""
    return [score for score in scores if score.seeds >= LEAST_SEEDS]


def over_lower(of_size: Sequence[Score]) -> dict[str, list[Verdict]]:
    """Return, by a row's name, its comparisons with each row at its size that has a lower loss.

    p is corrected for the row's comparisons with all others: the row that is truly the lowest, whichever it is, is
    found above another one with a probability of 5 % at most (multiple comparisons with the best: Hsu 1981, Annals of
    Statistics 9, 1026-1034).
    """
    found = {}
    for score in of_size:
        with_all = corrected([compare(score, other) for other in of_size if other is not score])
        found[score.row] = [one for one in with_all if one.theirs.nats < score.nats]
    return found


@dataclasses.dataclass(frozen=True)
class Carried:
    """What came of a row whose rate was carried from a neighbouring size or another suite (`frontier_trials`).

    Attributes:
        lost: Nats a token that the carried rate itself lost against the row's best, infinite where it diverged.
        followed: Whether the best of the first three was an end of them, so that others followed.
        is_between: Whether the best rate lies between two others.
    """

    lost: float
    followed: bool
    is_between: bool


def carried(done: Results) -> list[Carried]:
    """Return what came of each row whose rate was carried."""
    by_row: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in done.values():
        if r["row"] != "base" and r["seed"] == TUNING_SEED and r.get("carried_from"):
            by_row.setdefault((r["model"], r["regime"], r["base"], r["size"], r["row"]), []).append(r)
    found = []
    for results in by_row.values():
        nats = {r["rate"]: math.inf if r["nll"] is None else r["nll"] for r in results}
        first = results[0]["first_rates"]
        best = best_rate(nats)
        if nats.keys() >= set(first) and math.isfinite(nats[best]):  # all of them have a result
            is_between = not is_at_end(best, nats)
            found.append(Carried(nats[first[1]] - nats[best], len(nats) > len(first), is_between))
    return found
