"""Two runs' answers to the same questions: the difference, its 95 % interval, and McNemar's test."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Z = 1.959964  # of a two-sided 95 % interval
RESAMPLES = 1_000


@dataclass(frozen=True)
class Paired:
    """How a score changes from one run to another on the examples that both have.

    Attributes:
        common: How many examples both have.
        difference: Of the second from the first, on those.
        low: Lower end of its 95 % interval.
        high: Upper end.
        gained: Examples that only the second has right; None for a score that is no share of right answers.
        lost: Examples that only the first has right.
        p: McNemar's exact, two-sided p.
    """

    common: int
    difference: float
    low: float
    high: float
    gained: int | None = None
    lost: int | None = None
    p: float | None = None


def mcnemar_p(gained: int, lost: int) -> float:
    """Return McNemar's exact two-sided p for so many newly right and newly wrong answers."""
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def paired_accuracy(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two runs' right and wrong answers to the same examples, in the same order; at least one.

    The interval is Agresti and Min's (2005, Statistics in Medicine 24, 729-740): Wald's for matched pairs, with half a
    pair added to each of the four cells, so that it has a width where no two answers differ, too.
    """
    both = list(zip(first, second, strict=True))
    num, gained, lost = len(both), both.count((False, True)), both.count((True, False))
    padded, shift = num + 2, gained - lost
    center = shift / padded
    half = Z * math.sqrt(gained + lost + 1 - shift**2 / padded) / padded
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return Paired(num, shift / num, low, high, gained, lost, mcnemar_p(gained, lost))


def paired_bootstrap(measure: Callable[["np.ndarray"], tuple[float, float]], num: int, seed: int = 0) -> Paired:
    """Compare two scores of any kind by resampling the examples that both have.

    Args:
        measure: Returns both scores of the examples with these indices `[num]`.
        num: How many examples there are.
        seed: Of the resampling.

    Returns:
        The difference with its percentile interval of `RESAMPLES` resamples.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    pairs = [measure(draw.integers(0, num, num)) for _ in range(RESAMPLES)]
    low, high = np.quantile([second - first for first, second in pairs], (0.025, 0.975))
    first, second = measure(np.arange(num))
    return Paired(num, second - first, float(low), float(high))


def wilson(right: int, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers (Wilson, 1927), inside [0, 1] also near its ends."""
    share, scale = right / num, 1 + Z**2 / num
    center = (share + Z**2 / (2 * num)) / scale
    half = Z * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)
