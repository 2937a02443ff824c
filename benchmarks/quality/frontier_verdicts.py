"""What the frontier's trials say: means with errors, and paired comparisons corrected for how many there are.

A row's score is the nats a token of the test part's answers, over all answers and seeds. Its standard error, and the
interval and p of a difference between two rows, come from one bootstrap that draws questions and, for each row, seeds,
with replacement; the same questions for both rows of a pair. Which rows are compared at a size is decided on the part
that rates were chosen on: the best of LSR-Adapt and Kron-LoRA, and the best of the others. p is corrected by Holm's
method over all comparisons of the table (Holm 1979, Scandinavian Journal of Statistics 6, 65-70).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.frontier import unpacked
from benchmarks.quality.frontier_rows import OURS, SIZES
from benchmarks.quality.trials import TUNING_SEED

DRAWS, CHUNK = 10_000, 500
Results = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A row at a size, on one model, base and kind of text.

    Attributes:
        model: "smollm2" or "qwen".
        regime: The kind of text.
        base: How the base is held.
        size: A size of `frontier_rows.SIZES`.
        row: The row's name.
        method: Its method.
        options: Its adapter's.
        parameters: Trained ones.
        rate: The learning rate that was chosen.
        tuned: Nats a token on the part that it was chosen on.
        losses: `[seeds, questions]`, nats of each right answer.
        accuracy: Mean over seeds and tasks, None for texts without choices.
    """

    model: str
    regime: str
    base: str
    size: str
    row: str
    method: str
    options: Mapping[str, Any]
    parameters: int
    rate: float
    tuned: float
    losses: np.ndarray
    accuracy: float | None

    @property
    def suite(self) -> tuple[str, str, str]:
        """What scores must share to be compared."""
        return self.model, self.regime, self.base


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The best of ours beside the best of the others at a size; `difference` is ours less theirs, in nats a token."""

    ours: Score
    theirs: Score
    difference: float
    low: float
    high: float
    p: float
    corrected_p: float = math.nan

    @property
    def wins(self) -> bool:
        """Whether ours is lower, and separated after the correction."""
        return self.difference < 0 and self.corrected_p < 0.05


def answer_tokens(done: Results, suite: tuple[str, str, str]) -> np.ndarray:
    """Return how many tokens each right answer of the test part has."""
    return unpacked(done["-".join(suite) + "-base-test"]["answer_tokens"])


def scores(done: Results) -> list[Score]:
    """Return all rows that have a seed on the test part, by model, text, base, size and row.

    A row of which a seed diverged is left out: `diverged` names those.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in done.values():
        if result["row"] != "base":
            key = tuple(result[name] for name in ("model", "regime", "base", "size", "row"))
            groups.setdefault(key, []).append(result)
    found = []
    for key, results in groups.items():
        tests = sorted((r for r in results if r["seed"] != TUNING_SEED), key=lambda r: r["seed"])
        if not tests or any(r["nll"] is None for r in tests):
            continue
        first = tests[0]
        tuned = [r["nll"] for r in results if r["seed"] == TUNING_SEED and r["rate"] == first["rate"]]
        accuracies = [r["accuracy"] for r in tests]
        found.append(
            Score(
                *key,  # pyright: ignore[reportArgumentType]
                method=first["method"],
                options=first["options"],
                parameters=first["trainable_parameters"],
                rate=first["rate"],
                tuned=tuned[0] if tuned and tuned[0] is not None else math.inf,
                losses=np.array([unpacked(r["losses"]) for r in tests]),
                accuracy=None if None in accuracies else float(np.mean(accuracies)),
            )
        )
    order = list(SIZES)
    return sorted(found, key=lambda s: (s.suite, order.index(s.size), s.method, s.row))


def diverged(done: Results) -> list[str]:
    """Return the names of trials of the test part that diverged."""
    return [name for name, r in done.items() if r["row"] != "base" and r["seed"] != TUNING_SEED and r["nll"] is None]


def drawn(several: Sequence[np.ndarray], tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return `[DRAWS, rows]` of nats a token, of resampled questions (the same for all rows) and seeds (each its own).

    Args:
        several: The losses `[seeds, questions]` of each row, of the same questions.
        tokens: `[questions]`, of each answer.
        seed: Of the draws.
    """
    draw, size = np.random.default_rng(seed), len(tokens)
    parts = []
    for _ in range(DRAWS // CHUNK):
        times = draw.multinomial(size, np.full(size, 1 / size), CHUNK).astype(np.float64)  # a question is drawn
        rows = []
        for losses in several:
            num = len(losses)
            shares = draw.multinomial(num, np.full(num, 1 / num), CHUNK) / num
            rows.append((shares * (times @ losses.T)).sum(1))
        parts.append(np.stack(rows, 1) / (times @ tokens)[:, None])
    return np.concatenate(parts)


def mean_and_error(score: Score, tokens: np.ndarray) -> tuple[float, float]:
    """Return a row's nats a token and its standard error."""
    return per_token(score, tokens), float(drawn([score.losses], tokens).std())


def per_token(score: Score, tokens: np.ndarray) -> float:
    """Return a row's nats a token, over all seeds."""
    return float(score.losses.mean(0).sum() / tokens.sum())


def compare(ours: Score, theirs: Score, tokens: np.ndarray) -> Verdict:
    """Return the paired difference of two rows with its 95 % interval and two-sided p."""
    first, second = drawn([ours.losses, theirs.losses], tokens).T
    differences = first - second
    tail = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    low, high = np.quantile(differences, (0.025, 0.975))
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return Verdict(ours, theirs, per_token(ours, tokens) - per_token(theirs, tokens), float(low), float(high), p)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number."""
    corrected, before = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        before = max(before, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = before
    return corrected


def verdicts(done: Results) -> list[Verdict]:
    """Return one comparison a model, text, base and size that has rows of both kinds, all corrected together."""
    found = []
    for (suite, _), group in itertools.groupby(scores(done), key=lambda s: (s.suite, s.size)):
        rows = list(group)
        best = [
            min((s for s in rows if (s.method in OURS) == mine), key=lambda s: s.tuned, default=None)
            for mine in (True, False)
        ]
        if None not in best:
            found.append(compare(*best, answer_tokens(done, suite)))  # pyright: ignore[reportArgumentType]
    corrected = holm([verdict.p for verdict in found])
    return [dataclasses.replace(v, corrected_p=p) for v, p in zip(found, corrected, strict=True)]


def neighbours(done: Results) -> Iterator[tuple[str, str, str, float]]:
    """Yield what a rate carried from the next smaller size of a method would cost: is tuning at every size needed?

    Yields:
        Suite, row and the row that the rate comes from, and the nats a token that it loses against the row's own best.
    """
    tuned: dict[tuple[str, str, str, str], dict[float, float]] = {}
    for r in done.values():
        if r["row"] != "base" and r["seed"] == TUNING_SEED and r["nll"] is not None:
            suite = "-".join((r["model"], r["regime"], r["base"]))
            tuned.setdefault((suite, r["method"], r["size"], r["row"]), {})[r["rate"]] = r["nll"]
    order = list(SIZES)
    keys = sorted(tuned, key=lambda key: (key[0], key[1], order.index(key[2]), key[3]))
    for before, after in itertools.pairwise(keys):
        if before[:2] == after[:2] and before[2] != after[2]:
            carried = min(tuned[before], key=lambda rate: tuned[before][rate])
            if carried in tuned[after]:
                lost = tuned[after][carried] - min(tuned[after].values())
                yield after[0], f"{after[2]} {after[3]}", f"{before[2]} {before[3]}", lost
