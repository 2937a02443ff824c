"""What the trials of `grpo_gsm8k.py` say: accuracies with errors; is a small adapter within a point of LoRA?

Errors and intervals are of questions, which all rows share, and of seeds, which are each row's own, by Student's
distribution (`estimates.py`); they are not corrected for how many there are. The question is asked of rows with
`SMALL` of the reference's parameters or fewer, under GRPO. A row's answer is "within" where the whole interval of its
accuracy less the reference's lies inside of +-`WITHIN`, "below" or "above" where it lies outside, otherwise
"undecided". LSR-Adapt's answer is that of its row with the highest reward where rates were chosen, not on the test.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import estimates
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.grpo_rows import LAST, REFERENCE, ROWS, TRAININGS
from benchmarks.quality.rate_trials import best_rate, is_at_end, tried, unpacked
from benchmarks.quality.trials import TUNING_SEED

WITHIN = 0.01  # of the questions: one point
SMALL = 0.02  # of the reference's parameters
FALLEN = 0.25  # of the highest mean reward of `LAST` steps: more than chance takes
Results = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
    """What the seeds of an adapter reached by one training.

    Attributes:
        training: "grpo" or "sft".
        row: A row of `grpo_rows`.
        right: `[seeds, questions]`, whether each test question was answered rightly.
        results: The seeds' lines.
        tried: What each rate lost in tuning: less reward, or more loss; infinite where it diverged.
    """

    training: str
    row: str
    right: np.ndarray
    results: Sequence[dict[str, Any]]
    tried: Mapping[float, float]

    @property
    def accuracy(self) -> Estimate:
        """Mean over questions and seeds."""
        return estimates.mean(self.right, np.ones(self.right.shape[1]))

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return self.results[0]["trainable_parameters"]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.results)

    @property
    def rates(self) -> list[float]:
        """The seeds' learning rates: one, unless the choice was another when a seed was trained."""
        return sorted({result["rate"] for result in self.results})

    @property
    def is_at_end(self) -> bool:
        """Whether its rate is the first or the last of those that were tried, and a better one may lie beyond."""
        return any(is_at_end(rate, self.tried) for rate in self.rates)

    @property
    def tuned(self) -> float:
        """What its best rate lost in tuning."""
        return min(self.tried.values(), default=math.inf)

    def over(self, other: "Score") -> Estimate:
        """Return the accuracy less another's, on the same questions."""
        return estimates.difference(self.right, other.right, np.ones(self.right.shape[1]))

    def mean_of(self, name: str, steps: slice = slice(None)) -> float | None:
        """Return the mean of a curve's steps over the seeds; None where it was not kept."""
        if not all(result["curve"].get(name) for result in self.results):
            return None
        return statistics.fmean(statistics.fmean(result["curve"][name][steps]) for result in self.results)

    @property
    def rewards(self) -> tuple[float, float]:
        """The highest mean reward of `LAST` steps in a row, and that of the last ones; the seed that lost the most."""
        return min((_highest_and_last(r["curve"]["reward"]) for r in self.results), key=lambda ends: ends[1] / ends[0])

    @property
    def fell(self) -> bool:
        """Whether a seed's reward had fallen by the end, by more than `FALLEN` of its highest."""
        highest, last = self.rewards
        return last < (1 - FALLEN) * highest


def _highest_and_last(rewards: Sequence[float]) -> tuple[float, float]:
    means = [statistics.fmean(rewards[end - LAST : end]) for end in range(LAST, len(rewards) + 1)]
    means = means or [statistics.fmean(rewards)]
    return max(*means, 1e-9), means[-1]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A small row beside the reference, by GRPO; `share` is its part of the reference's parameters."""

    ours: Score
    reference: Score
    share: float

    @property
    def estimate(self) -> Estimate:
        """The accuracy less the reference's."""
        return self.ours.over(self.reference)

    @property
    def outcome(self) -> str:
        """Where the interval lies: "within", "below" or "above" +-`WITHIN`, or "undecided" as it crosses an end."""
        low, high = self.estimate.interval
        if low > WITHIN or high < -WITHIN:
            return "above" if low > WITHIN else "below"
        return "within" if low >= -WITHIN and high <= WITHIN else "undecided"

    @property
    def knows_seeds(self) -> bool:
        """Whether both have seeds enough that their spread is in the interval."""
        return min(self.ours.seeds, self.reference.seeds) > 1


def all_suites(done: Results) -> list[str]:
    """Return the suites of trials, those too of which no row has an accuracy."""
    return list(dict.fromkeys(result["suite"] for result in done.values() if result["row"] != "base"))


def suites(done: Results) -> list[str]:
    """Return the suites that have a row with an accuracy."""
    return [suite for suite in all_suites(done) if scores(done, suite)]


def of_row(done: Results, suite: str, training: str, row: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the trials of a row that a rate is chosen by, and those of its seeds, in their order."""
    mine = [r for r in done.values() if (r["suite"], r.get("training"), r["row"]) == (suite, training, row)]
    tuning = [result for result in mine if result["seed"] == TUNING_SEED]
    return tuning, sorted((result for result in mine if result["seed"] != TUNING_SEED), key=lambda r: r["seed"])


def chosen(of_rates: Mapping[float, float]) -> float | None:
    """Return the best rate of those that were tried; None where none was, or all diverged."""
    best = best_rate(of_rates) if of_rates else None
    return best if best is not None and math.isfinite(of_rates[best]) else None


def scores(done: Results, suite: str) -> list[Score]:
    """Return a suite's adapters by training, in the order of `grpo_rows`; those whose seeds all finished."""
    found = []
    for training, row in itertools.product(TRAININGS, ROWS):
        tuning, seeds = of_row(done, suite, training, row)
        if seeds and all("right" in result for result in seeds):
            right = np.array([unpacked(result["right"]) for result in seeds], np.float64)
            found.append(Score(training, row, right, seeds, tried(tuning)))
    return found


def diverged(done: Results, suite: str) -> list[str]:
    """Return the names of a suite's seeds that diverged, whose rows are left out."""
    of_suite = {name: r for name, r in done.items() if r["suite"] == suite and r["row"] != "base"}
    return [name for name, r in of_suite.items() if r["seed"] != TUNING_SEED and "right" not in r]


def reference_parameters(done: Results, suite: str) -> int | None:
    """Return how many parameters the reference has, by any of its trials."""
    mine = (r for r in done.values() if (r["suite"], r["row"]) == (suite, REFERENCE))
    return next((r["trainable_parameters"] for r in mine if "trainable_parameters" in r), None)


def over_base(done: Results, score: Score) -> Estimate | None:
    """Return an accuracy less that of no adapter, which has no seeds; None where that was not measured."""
    base = done.get(f"{score.results[0]['suite']}-base")
    if base is None:
        return None
    right = unpacked(base["right"]).astype(np.float64)[None]
    return estimates.difference(score.right, right, np.ones(right.shape[1]))


def verdicts(done: Results, suite: str) -> list[Verdict]:
    """Return the rows that are small enough for the question, the smallest first; none without the reference."""
    by_grpo = {score.row: score for score in scores(done, suite) if score.training == "grpo"}
    reference = by_grpo.pop(REFERENCE, None)
    if reference is None:
        return []
    found = [Verdict(score, reference, score.parameters / reference.parameters) for score in by_grpo.values()]
    return sorted((one for one in found if one.share <= SMALL), key=lambda one: one.share)


def answer(found: Sequence[Verdict]) -> Verdict | None:
    """Return LSR-Adapt's: of its small rows the one that was best where rates are chosen; None without any."""
    return min(
        (one for one in found if ROWS[one.ours.row].method == "lsr"), key=lambda one: one.ours.tuned, default=None
    )
