"""What came of each row of the frontier: the rate that was chosen for it, and what its seeds at that rate scored.

A row's score is the nats a token of the test part's answers, over all answers and seeds. Its rate is the one that lost
least where rates are chosen, as the trials are planned (`frontier_trials.Plan`); where a seed diverged at it, or ended
with more loss than the base alone has, the best of the lower rates, once the row has seeds there. Seeds at other rates,
such as those or what a rate that was tried later leaves behind, are not counted. A row of which a seed diverged at its
rate has no score.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import estimates
from benchmarks.quality.frontier_rows import SIZES
from benchmarks.quality.rate_trials import is_at_end, seed_rates, unpacked
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale.planning.evidence import OURS

Results = Mapping[str, dict[str, Any]]
Suite = tuple[str, str, str]  # model, regime and base: what scores must share to be compared
Key = tuple[Suite, str, str]  # suite, size and row
LEAST_SEEDS = 2  # of a row that is compared: one seed says nothing of the spread of seeds


@dataclasses.dataclass(frozen=True)
class Row:
    """A row at a size, on one model, base and kind of text, of which rates were tried.

    Attributes:
        suite: Model ("smollm2" or "qwen"), kind of text, and how the base is held.
        size: A size of `frontier_rows.SIZES`.
        row: The row's name.
        method: Its method.
        options: Its adapter's.
        optimizer: `training.optim`, None for AdamW.
        parameters: Trained ones, 0 where every trial diverged before they were counted.
        rate: The learning rate that was chosen.
        rates: All that were tried.
        tuned: Nats a token on the part that it was chosen on, infinite where all diverged.
        seeds: How many were trained at that rate.
        diverged: How many of them diverged.
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
    diverged: int

    @property
    def is_at_end(self) -> bool:
        """Whether its rate is the first or the last of those that were tried, and a better one may lie beyond."""
        return is_at_end(self.rate, self.rates)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this package's two methods."""
        return self.method in OURS


@dataclasses.dataclass(frozen=True)
class Score(Row):
    """A row that has seeds on the test part, none of which diverged.

    Attributes:
        nats: A token of the test part's right answers, over all seeds.
        losses: `[seeds, questions]`, nats of each.
        tokens: `[questions]`, of each.
        right: `[seeds, questions]`, whether each was answered rightly, so weighted that the mean is the accuracy; None
            for texts without choices.
        accuracy: Mean over seeds and tasks, None for texts without choices.
        worse_than_base: How many seeds lost more than the base without an adapter: they diverged, and ended finite.
    """

    nats: float
    losses: np.ndarray
    tokens: np.ndarray
    right: np.ndarray | None
    accuracy: float | None
    worse_than_base: int

    @property
    def error(self) -> float:
        """The standard error of its nats a token."""
        return estimates.mean(self.losses, self.tokens).error


def key_of(result: Mapping[str, Any]) -> Key:
    """Return which row a trial is of."""
    return (result["model"], result["regime"], result["base"]), result["size"], result["row"]


def tuning(done: Results) -> dict[Key, dict[float, float]]:
    """Return the nats a token of each rate that a row was tuned over, infinite where the training diverged."""
    found: dict[Key, dict[float, float]] = {}
    for result in done.values():
        if result["row"] != "base" and result["seed"] == TUNING_SEED:
            nats = math.inf if result["nll"] is None else result["nll"]
            found.setdefault(key_of(result), {})[result["rate"]] = nats
    return found


def chosen_rates(done: Results) -> dict[Key, float]:
    """Return the rate of each row that was tuned: the last of `seed_rates` that has seeds enough, else the first."""
    by_rate: dict[Key, dict[float, list[float]]] = {}
    for result in done.values():
        if result["row"] != "base" and result["seed"] != TUNING_SEED:
            nats = math.inf if result["nll"] is None else result["nll"]
            by_rate.setdefault(key_of(result), {}).setdefault(result["rate"], []).append(nats)
    found = {}
    for key, of_rates in tuning(done).items():
        of_seeds = by_rate.get(key, {})
        limit = done.get("-".join(key[0]) + "-base-test", {"nll": math.inf})["nll"]
        first, *lower = seed_rates(of_rates, of_seeds, limit)
        found[key] = next((rate for rate in reversed(lower) if len(of_seeds.get(rate, ())) >= LEAST_SEEDS), first)
    return found


def seeds(done: Results, chosen: Mapping[Key, float]) -> tuple[dict[Key, list[dict[str, Any]]], list[str]]:
    """Return the seeds of each row at the rate that was chosen, in their order, and names of seeds at other rates."""
    kept: dict[Key, list[dict[str, Any]]] = {}
    others = []
    for name, result in done.items():
        if result["row"] == "base" or result["seed"] == TUNING_SEED:
            continue
        if result["rate"] == chosen.get(key_of(result)):
            kept.setdefault(key_of(result), []).append(result)
        else:
            others.append(name)
    return {key: sorted(results, key=lambda r: r["seed"]) for key, results in kept.items()}, others


def rows(done: Results) -> list[Row]:
    """Return every row that was tuned, by suite, size and method; those that have one as a `Score`."""
    chosen = chosen_rates(done)
    kept, _ = seeds(done, chosen)
    found = []
    about: dict[Key, dict[str, Any]] = {}
    for result in done.values():  # one that diverged may not know how many parameters it had
        if result["row"] != "base" and (key_of(result) not in about or "trainable_parameters" in result):
            about[key_of(result)] = result
    for key, of_rates in tuning(done).items():
        mine, first = kept.get(key, []), about[key]
        row = {
            **{"suite": key[0], "size": key[1], "row": key[2]},
            **{"method": first["method"], "options": first["options"], "optimizer": first.get("optimizer")},
            **{
                "parameters": first.get("trainable_parameters", 0),
                "rate": chosen[key],
                "rates": sorted(of_rates),
            },
            **{"tuned": of_rates[chosen[key]], "seeds": len(mine)},
            "diverged": sum(r["nll"] is None for r in mine),
        }
        found.append(Row(**row) if row["diverged"] or not mine else Score(**row, **_scored(done, key[0], mine)))
    order = list(SIZES)
    return sorted(found, key=lambda s: (s.suite, order.index(s.size), s.method, s.row))


def _scored(done: Results, suite: Suite, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens, losses = answer_tokens(done, suite), np.array([unpacked(r["losses"]) for r in results])
    accuracies = [r["accuracy"] for r in results]
    base = done["-".join(suite) + "-base-test"]["nll"]
    return {
        **{"nats": estimates.mean(losses, tokens).value, "losses": losses, "tokens": tokens},
        **{"right": right_of(results), "accuracy": None if None in accuracies else float(np.mean(accuracies))},
        "worse_than_base": int((losses.sum(1) / tokens.sum() > base).sum()),
    }


def answer_tokens(done: Results, suite: Suite) -> np.ndarray:
    """Return how many tokens each right answer of the test part has."""
    return unpacked(done["-".join(suite) + "-base-test"]["answer_tokens"])


def right_of(results: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Return `[seeds, questions]`, what seeds answered rightly, each task weighted alike; None without choices."""
    if any("right" not in r for r in results):
        return None
    counts = [task["rows"] for task in results[0]["tasks"].values()]
    weights = np.concatenate([np.full(count, sum(counts) / len(counts) / count) for count in counts])
    return np.array([unpacked(r["right"]) for r in results]) * weights
