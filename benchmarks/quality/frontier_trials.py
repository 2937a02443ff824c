"""Which trials of the frontier can be done: rates that a row is tried at, its own or its neighbour's, and seeds.

With `carry` only the sizes of `TUNED_IN_FULL` are tuned over all rates of a method. A row at another size is tried at
the best rate of the row of its method at a neighbouring one of them, and at the rate on each side of that; where the
best is the first or the last of the three, the next ones beyond follow, as they do for every row, up to as many as all
have. So the best lies between two others here too. A row without such a neighbour is tuned in full. Rates of another
suite (`Elsewhere`) are carried in the same way, to the rows of its method at its sizes.

Where a seed diverges at the best rate, or ends with more loss than the base alone has, the row's seeds are trained at
the best of the lower rates too, and those are compared (`frontier_scores`).
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.frontier_data import EPOCHS
from benchmarks.quality.frontier_rows import ROWS, SIZES, AdapterRow
from benchmarks.quality.rate_trials import RateTrial, best_rate, rates_left, seed_rates
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale.model import Quantization

MOST_BEYOND = 2  # rates tried beyond an end
TUNED_IN_FULL = {"smollm2": ("5k", "60k", "300k", "2.4m"), "qwen": ("20k", "150k")}
Results = Mapping[str, dict[str, Any]]
Place = tuple[str, str]  # a size and a row's name


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the trials of one call share: model, base and texts, and where their files are."""

    work: Path
    model: str  # "smollm2" or "qwen"
    folder: str  # the model's name or folder
    regime: str
    base: Quantization
    limit: int | None = None  # of rows and questions: a trial of the program
    max_steps: int = -1
    answers: bool = False  # whether the test questions of GSM8K are answered too

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        return {"model": self.model, "regime": self.regime, "base": self.base}

    @property
    def prefix(self) -> str:
        """The beginning of its trials' names."""
        return f"{self.model}-{self.regime}-{self.base}"

    def epochs(self, trial: "Trial") -> int:
        """Return how long a trial trains."""
        return 1 if trial.tunes else EPOCHS[self.regime]

    def row(self, place: Place) -> AdapterRow:
        """Return the row of a place."""
        return ROWS[self.model][place[0]][place[1]]


@dataclasses.dataclass(frozen=True)
class Trial(RateTrial):
    """One training: an adapter at a size, a rate and a seed."""

    size: str
    row: str
    seed: int
    rate: float

    @property
    def place(self) -> Place:
        """Its size and row."""
        return self.size, self.row


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates that a row is tried at before any beyond their ends.

    Attributes:
        first_rates: These.
        carried_from: The size and row whose best rate is the middle one; None where they are the method's.
        carried_suite: The prefix of the suite that this row is of, None for the same.
    """

    first_rates: tuple[float, ...]
    carried_from: Place | None = None
    carried_suite: str | None = None

    @classmethod
    def stored(cls, result: Mapping[str, Any]) -> "Rates":
        """Return those of a result, as JSON has them."""
        carried = result["carried_from"]
        place = carried and (carried[0], carried[1])
        return cls(tuple(result["first_rates"]), place, result.get("carried_suite"))


def rates_to_try(row: AdapterRow, tuned: Mapping[float, float], rates: Rates | None = None) -> tuple[float, ...]:
    """Return the rates of a row that have no result yet; none left once the best is between two others.

    Args:
        row: The adapter.
        tuned: The nats a token of each rate that was tried, infinite where the training diverged.
        rates: Those tried first, by default the method's; as many may follow that all rows have as many at most.
    """
    first = row.rates if rates is None else rates.first_rates
    return rates_left(first, tuned, len(row.rates) + MOST_BEYOND - len(first))


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Another suite, whose rates are tried first: the same rows on another base, another model or other texts.

    Attributes:
        suite: That one.
        done: Its results by name.
    """

    suite: Suite
    done: Results

    def rates(self, place: Place, row: AdapterRow) -> Rates | None:
        """Return the rates around the best one there: of a row's method at its size, as `neighbours` has them."""
        plan = Plan(self.suite, (), self.done)
        found = [
            (place[0], name)
            for name, other in ROWS[self.suite.model].get(place[0], {}).items()
            if _kind(other) == _kind(row)
        ]
        for other in sorted(found, key=lambda one: (one[1] != place[1], _distance(self.suite.row(one), row))):
            if (best := plan.best(other)) is not None:
                return Rates(around(best, row.rates), other, self.suite.prefix)
        return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be done next, by what has been done.

    Attributes:
        suite: Of the trials.
        places: The rows that are to be done.
        done: The results by name.
        carry: Whether rates are carried from neighbouring sizes.
        failed: Rows of which a trial failed, for which none waits.
        elsewhere: Another suite, whose rates go before those of neighbours.
    """

    suite: Suite
    places: Collection[Place]
    done: Results
    carry: bool = False
    failed: Collection[Place] = ()
    elsewhere: Elsewhere | None = None

    def trials(self, seeds: int) -> dict[Trial, Rates]:
        """Return the trials that can be done now: rates to be tried, and seeds at rates that were chosen."""
        found: dict[Trial, Rates] = {}
        for place in self.places:
            rates = self.rates(place)
            if rates is None:
                continue
            tuned = self.tuned(place)
            if left := rates_to_try(self.suite.row(place), tuned, rates):
                found |= {Trial(*place, TUNING_SEED, rate): rates for rate in left}
            else:
                # one at which tuning diverged too: its seeds say so
                for rate in seed_rates(tuned, self._seeds(place), self._limit):
                    found |= {Trial(*place, seed, rate): rates for seed in range(seeds)}
        return {trial: of_it for trial, of_it in found.items() if f"{self.suite.prefix}-{trial.name}" not in self.done}

    def tuned(self, place: Place) -> dict[float, float]:
        """Return the nats a token of the rates that were tried of a row."""
        found = self._tuning(place)
        return {result["rate"]: math.inf if result["nll"] is None else result["nll"] for result in found}

    def rates(self, place: Place) -> Rates | None:
        """Return a row's rates, as its first result says if it has one; None while a neighbour is to be tuned first."""
        own = Rates(self.suite.row(place).rates)
        for result in self._tuning(place):
            return Rates.stored(result) if "first_rates" in result else own
        if self.elsewhere is not None and (rates := self.elsewhere.rates(place, self.suite.row(place))) is not None:
            return rates
        for other in neighbours(self.suite, place) if self.carry else ():
            if (best := self.best(other)) is not None:
                return Rates(around(best, own.first_rates), other)
            if not self._is_tuned(other) and other in self.places and other not in self.failed:
                return None
        return own

    def best(self, place: Place) -> float | None:
        """Return the best rate of a row; None while rates are to be tried, and where all diverged."""
        tuned = self.tuned(place)
        best = best_rate(tuned) if self._is_tuned(place) else None
        return best if best is not None and math.isfinite(tuned[best]) else None

    @property
    def _limit(self) -> float:
        """What the base alone loses, infinite while that is not known."""
        return self.done.get(f"{self.suite.prefix}-base-test", {"nll": math.inf})["nll"]

    def _seeds(self, place: Place) -> dict[float, list[float]]:
        """Return what a row's seeds lost, by their rates."""
        found: dict[float, list[float]] = {}
        start = f"{self.suite.prefix}-{'-'.join(place)}-seed"
        for name, result in self.done.items():
            if name.startswith(start):
                found.setdefault(result["rate"], []).append(math.inf if result["nll"] is None else result["nll"])
        return found

    def _is_tuned(self, place: Place) -> bool:
        tuned = self.tuned(place)
        return bool(tuned) and not rates_to_try(self.suite.row(place), tuned, self.rates(place))

    def _tuning(self, place: Place) -> list[dict[str, Any]]:
        start = f"{self.suite.prefix}-{'-'.join(place)}-tune-"
        return [result for name, result in self.done.items() if name.startswith(start)]


def places(suite: Suite, sizes: Iterable[str], rows: Collection[str] | None) -> list[Place]:
    """Return the rows of sizes that the base takes: those that are named, or all but variants."""
    return [
        (size, name)
        for size in sizes
        for name, row in ROWS[suite.model].get(size, {}).items()
        if (name in rows if rows else "+" not in name) and row.takes(suite.base)
    ]


def around(best: float, rates: tuple[float, ...]) -> tuple[float, ...]:
    """Return a rate between the ones on each side of it, as far apart as rates are."""
    step = rates[1] / rates[0]
    return tuple(float(f"{rate:.4g}") for rate in (best / step, best, best * step))


def neighbours(suite: Suite, place: Place) -> list[Place]:
    """Return the rows whose best rate may be carried to a row, the nearest first; none to a size tuned in full.

    They are of its kind (method, start, optimizer), at the next smaller and the next larger of the sizes tuned in full:
    of the same name before others, then of the nearer size, then of the more alike shape, separation rank by rank.
    """
    in_full, size = TUNED_IN_FULL[suite.model], place[0]
    if size in in_full:
        return []
    smaller = [one for one in in_full if SIZES[one] < SIZES[size]][-1:]
    larger = [one for one in in_full if SIZES[one] > SIZES[size]][:1]
    kind = _kind(suite.row(place))

    def distance(other: Place) -> tuple[bool, float, float]:
        of_size = abs(math.log(SIZES[other[0]] / SIZES[size]))
        return other[1] != place[1], of_size, _distance(suite.row(other), suite.row(place))

    found = [
        (one, name)
        for one in (*smaller, *larger)
        for name, row in ROWS[suite.model].get(one, {}).items()
        if _kind(row) == kind and row.takes(suite.base)
    ]
    return sorted(found, key=distance)


def _kind(row: AdapterRow) -> tuple[Any, ...]:
    return row.method, row.optimizer, row.options.get("init"), row.options.get("train")


def _distance(one: AdapterRow, other: AdapterRow) -> float:
    return abs(_shape(one) - _shape(other))


def _shape(row: AdapterRow) -> float:
    """Return the logarithm of LSR-Adapt's separation rank by its rank, 0 for other methods."""
    options = row.options
    return math.log(options["separation_rank"] / options["rank"]) if "separation_rank" in options else 0.0
