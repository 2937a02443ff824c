"""What the frontier's trials say: means with errors, and paired comparisons corrected for how many there are.

A row's score is the nats a token of the test part's answers, over all answers and seeds. Its standard error, and the
interval and p of a difference between two rows, are of questions, which are the same for both, and of seeds, which are
each row's own; as seeds are few, by Student's distribution (`estimates.py`). Which rows are compared at a size is
decided on the part that rates were chosen on: the best of LSR-Adapt and Kron-LoRA, and the best of the others, of rows
with two seeds or more. p is corrected by Holm's method over all comparisons of the table (Holm 1979, Scandinavian
Journal of Statistics 6, 65-70).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import estimates, trials
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.frontier_rows import OURS, SIZES
from benchmarks.quality.rate_trials import is_at_end, unpacked
from benchmarks.quality.trials import TUNING_SEED

SIGNIFICANT = 0.05
LEAST_SEEDS = 2  # of a row that is compared: one seed says nothing of the spread of seeds
Results = Mapping[str, dict[str, Any]]
Suite = tuple[str, str, str]  # model, regime and base: what scores must share to be compared
Key = tuple[Suite, str, str]  # suite, size and row


@dataclasses.dataclass(frozen=True)
class Score:
    """A row at a size, on one model, base and kind of text.

    Attributes:
        suite: Model ("smollm2" or "qwen"), kind of text, and how the base is held.
        size: A size of `frontier_rows.SIZES`.
        row: The row's name.
        method: Its method.
        options: Its adapter's.
        optimizer: `training.optim`, None for AdamW.
        parameters: Trained ones.
        rate: The learning rate that was chosen.
        rates: All that were tried.
        tuned: Nats a token on the part that it was chosen on.
        seeds: How many.
        nats: A token of the test part's right answers, over all seeds.
        losses: `[seeds, questions]`, nats of each.
        tokens: `[questions]`, of each.
        right: `[seeds, questions]`, whether each was answered rightly, so weighted that the mean is the accuracy; None
            for texts without choices.
        accuracy: Mean over seeds and tasks, None for texts without choices.
    """

    suite: Suite
    size: str
    row: str
    method: str
    options: Mapping[str, Any]
    optimizer: str | None
    parameters: int
    rate: float
    rates: Sequence[float]
    tuned: float
    seeds: int
    nats: float
    losses: np.ndarray
    tokens: np.ndarray
    right: np.ndarray | None
    accuracy: float | None

    @property
    def error(self) -> float:
        """The standard error of its nats a token."""
        return estimates.mean(self.losses, self.tokens).error

    @property
    def is_at_end(self) -> bool:
        """Whether its rate is the first or the last of those that were tried, and a better one may lie beyond."""
        return is_at_end(self.rate, self.rates)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this package's two methods."""
        return self.method in OURS


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
    def scores(self) -> list[Score]:
        """All rows that have a seed on the test part, by model, text, base, size and row.

        A row of which a seed diverged is left out: `diverged` names those.
        """
        return scores(self.done)

    @functools.cached_property
    def suites(self) -> list[Suite]:
        """The suites that have a row on the test part."""
        return list(dict.fromkeys(score.suite for score in self.scores))

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """The best of ours beside the best of the others, at each size that has both; all corrected together."""
        return verdicts(self.scores)

    @functools.cached_property
    def tuned(self) -> dict[Key, float]:
        """The nats a token of each row at its best rate, where rates are chosen; rows without seeds too."""
        return {key: min(of_rates.values()) for key, of_rates in tuning(self.done).items()}

    @functools.cached_property
    def diverged(self) -> list[str]:
        """The names of trials of the test part that diverged."""
        tests = (pair for pair in self.done.items() if pair[1]["row"] != "base" and pair[1]["seed"] != TUNING_SEED)
        return [name for name, result in tests if result["nll"] is None]

    def of(self, suite: Suite) -> list[Score]:
        """Return a suite's rows."""
        return [score for score in self.scores if score.suite == suite]

    def base(self, suite: Suite) -> dict[str, Any]:
        """Return what the base alone makes of a suite's test part."""
        return self.done["-".join(suite) + "-base-test"]


def load(results: Path) -> Frontier:
    """Return what is in a folder of results; the same object as long as its file stays as it is."""
    file = results / trials.FILE
    state = file.stat() if file.is_file() else None
    return _loaded(results, None if state is None else (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=2)
def _loaded(results: Path, state: Any) -> Frontier:
    return Frontier(trials.load(results))


def answer_tokens(done: Results, suite: Suite) -> np.ndarray:
    """Return how many tokens each right answer of the test part has."""
    return unpacked(done["-".join(suite) + "-base-test"]["answer_tokens"])


def _key(result: Mapping[str, Any]) -> Key:
    return (result["model"], result["regime"], result["base"]), result["size"], result["row"]


def tuning(done: Results) -> dict[Key, dict[float, float]]:
    """Return the nats a token of each rate that a row was tuned over, infinite where the training diverged."""
    found: dict[Key, dict[float, float]] = {}
    for result in done.values():
        if result["row"] != "base" and result["seed"] == TUNING_SEED:
            nats = math.inf if result["nll"] is None else result["nll"]
            found.setdefault(_key(result), {})[result["rate"]] = nats
    return found


def scores(done: Results) -> list[Score]:
    """Return the rows of trials: see `Frontier.scores`."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for result in done.values():
        if result["row"] != "base":
            groups.setdefault(_key(result), []).append(result)
    tried = tuning(done)
    tests = {
        key: sorted((r for r in results if r["seed"] != TUNING_SEED), key=lambda r: r["seed"])
        for key, results in groups.items()
    }
    whole = {key: rows for key, rows in tests.items() if rows and all(r["nll"] is not None for r in rows)}
    found = []
    for suite in dict.fromkeys(key[0] for key in whole):
        mine = {key: rows for key, rows in whole.items() if key[0] == suite}
        tokens = answer_tokens(done, suite)
        for key, rows in mine.items():
            first = rows[0]
            of_rates = tried.get(key, {})
            losses, accuracies = np.array([unpacked(r["losses"]) for r in rows]), [r["accuracy"] for r in rows]
            found.append(
                Score(
                    *key,
                    method=first["method"],
                    options=first["options"],
                    optimizer=first.get("optimizer"),
                    parameters=first["trainable_parameters"],
                    rate=first["rate"],
                    rates=sorted(of_rates) or (first["rate"],),
                    tuned=of_rates.get(first["rate"], math.inf),
                    seeds=len(rows),
                    nats=estimates.mean(losses, tokens).value,
                    losses=losses,
                    tokens=tokens,
                    right=right_of(rows),
                    accuracy=None if None in accuracies else float(np.mean(accuracies)),
                )
            )
    order = list(SIZES)
    return sorted(found, key=lambda s: (s.suite, order.index(s.size), s.method, s.row))


def right_of(rows: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Return `[seeds, questions]`, what rows answered rightly, each task weighted alike; None without choices."""
    if any("right" not in r for r in rows):
        return None
    counts = [task["rows"] for task in rows[0]["tasks"].values()]
    weights = np.concatenate([np.full(count, sum(counts) / len(counts) / count) for count in counts])
    return np.array([unpacked(r["right"]) for r in rows]) * weights


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


def verdicts(rows: Sequence[Score]) -> list[Verdict]:
    """Return one comparison a model, text, base and size that has rows of both kinds, all corrected together."""
    found = []
    for _, group in itertools.groupby(rows, key=lambda s: (s.suite, s.size)):
        of_size = compared(group)
        ours, theirs = (
            min((s for s in of_size if s.is_ours == mine), key=lambda s: s.tuned, default=None)
            for mine in (True, False)
        )
        if ours is not None and theirs is not None:
            found.append(compare(ours, theirs))
    return corrected(found)


def by_accuracy(found: Sequence[Verdict]) -> list[tuple[Verdict, Estimate, float]]:
    """Return comparisons with the difference of their accuracies and its p, corrected for how many have one."""
    pairs = [(one, one.accuracy) for one in found]
    known = [(one, accuracy) for one, accuracy in pairs if accuracy is not None]
    values = holm([accuracy.p for _, accuracy in known])
    return [(one, accuracy, p) for (one, accuracy), p in zip(known, values, strict=True)]


def compared(rows: Iterable[Score]) -> list[Score]:
    """Return the rows that have seeds enough to be compared."""
    return [score for score in rows if score.seeds >= LEAST_SEEDS]


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
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in done.values():
        if r["row"] != "base" and r["seed"] == TUNING_SEED and r.get("carried_from"):
            rows.setdefault((r["model"], r["regime"], r["base"], r["size"], r["row"]), []).append(r)
    found = []
    for results in rows.values():
        nats = {r["rate"]: math.inf if r["nll"] is None else r["nll"] for r in results}
        first = results[0]["first_rates"]
        best = min(nats, key=lambda rate: nats[rate])
        if nats.keys() >= set(first) and math.isfinite(nats[best]):  # all of them have a result
            is_between = min(nats) < best < max(nats)
            found.append(Carried(nats[first[1]] - nats[best], len(nats) > len(first), is_between))
    return found
