"""Scores over questions and seeds, and what two of them differ by, with errors that know how few the seeds are.

A row has a number for every question and seed; its score is the mean over seeds of sum(numbers) / sum(weights).

    variance = that of the ratio over questions (its linearization, of the mean over seeds)
             + that of the seeds' scores / number of seeds

Of a difference the questions are common to both rows, the seeds are each row's own. Intervals and p are Student's, with
Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2, 110-114): two or three seeds tell little of how far
seeds spread, and a bootstrap of them takes that for known.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of intervals: 95 %
NORMAL_FROM = 1_000  # degrees of freedom from which Student's distribution is taken for the normal one


@dataclass(frozen=True)
class Estimate:
    """A mean or difference, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        half = two_sided_quantile(self.freedom) * self.error
        return self.value - half, self.value + half

    @property
    def separates(self) -> bool:
        """Whether zero is outside of it."""
        low, high = self.interval
        return not low <= 0 <= high

    @property
    def p(self) -> float:
        """Two-sided, that it is zero."""
        if self.error == 0:
            return float(self.value == 0)
        return two_sided_p(abs(self.value) / self.error, self.freedom)


def mean(numbers: np.ndarray, weights: np.ndarray) -> Estimate:
    """Return a row's score; of one seed nobody knows the spread, which then is not in the error.

    Args:
        numbers: `[seeds, questions]`.
        weights: `[questions]`, such as an answer's tokens.
    """
    return _estimate(numbers.mean(0), weights, [numbers])


def difference(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> Estimate:
    """Return the first row's score less the second's, of the same questions; each has seeds of its own."""
    return _estimate(first.mean(0) - second.mean(0), weights, [first, second])


def _estimate(of_question: np.ndarray, weights: np.ndarray, rows: list[np.ndarray]) -> Estimate:
    value, count = of_question.sum() / weights.sum(), len(weights)
    of_questions = (of_question - value * weights).var(ddof=1) * count / weights.sum() ** 2 if count > 1 else 0.0
    of_seeds = [(row.sum(1).var(ddof=1) / weights.sum() ** 2 / len(row), len(row) - 1) for row in rows if len(row) > 1]
    variance = of_questions + sum(part for part, _ in of_seeds)
    squares = sum(part**2 / freedom for part, freedom in of_seeds)
    return Estimate(float(value), math.sqrt(variance), float(variance**2 / squares) if squares else math.inf)


def two_sided_p(t: float, freedom: float) -> float:
    """Return how probable it is that Student's t is farther from zero."""
    if freedom > NORMAL_FROM:
        return math.erfc(t / math.sqrt(2))
    # of t = sqrt(freedom) tan(angle) the density is as cos(angle)^(freedom - 1)
    nodes, shares = _gauss_legendre()
    half = (math.pi / 2 - math.atan(t / math.sqrt(freedom))) / 2
    tail = half * (shares * np.sin(half * (1 + nodes)) ** (freedom - 1)).sum()
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return min(1.0, float(tail) / whole)


def two_sided_quantile(freedom: float, level: float = LEVEL) -> float:
    """Return the t with so much probability beyond it on both sides."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > level:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > level else (low, middle)
    return high


@functools.cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(128)
