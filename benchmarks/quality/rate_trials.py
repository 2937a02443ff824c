"""Trials of one adapter at one rate and seed: how they are called, which rates are still to be tried, kept answers.

Used by `frontier.py` and `grpo_gsm8k.py`, whose results go on from one sitting to the next by these names.
"""

import base64
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.trials import TUNING_SEED


class RateTrial:
    """What such trials share: dataclasses of a size or training, with which their names begin, row, seed and rate."""

    @property
    def tunes(self: Any) -> bool:
        """Whether it is one of those that a rate is chosen by."""
        return self.seed == TUNING_SEED

    @property
    def name(self: Any) -> str:
        """The end of its name, a folder's too."""
        first, row, seed, rate = dataclasses.astuple(self)
        return f"{first}-{row}-{'tune' if self.tunes else f'seed{seed}'}-{rate:g}"


def rates_left(rates: Sequence[float], tuned: Mapping[float, float], most_beyond: int) -> tuple[float, ...]:
    """Return the rates that have no result yet; none left once the best is between two others.

    Args:
        rates: Those that are tried first, each the same multiple of the one before.
        tuned: What each rate that was tried lost, infinite where the training diverged.
        most_beyond: How many more are tried beyond an end, where the best is there.
    """
    missing = tuple(rate for rate in rates if rate not in tuned)
    if missing:
        return missing
    best = best_rate(tuned)
    if len(tuned) >= len(rates) + most_beyond or not is_at_end(best, tuned):
        return ()
    step = rates[1] / rates[0]
    return (float(f"{best / step if best == min(tuned) else best * step:.4g}"),)


def best_rate(tuned: Mapping[float, float]) -> float:
    """Return the rate that lost the least: of equals one between two others, then the middle of them, then the lower.

    A plateau of equals, such as no reward at any rate, is no reason to go beyond it. Where all diverged, it is the
    lowest, below which one may do.

    Args:
        tuned: What each rate that was tried lost, infinite where the training diverged.
    """
    ordered, least = sorted(tuned), min(tuned.values())
    if math.isinf(least):
        return ordered[0]
    equals = [place for place, rate in enumerate(ordered) if tuned[rate] == least]
    middle = (len(equals) - 1) / 2
    ranked = {place: (is_at_end(ordered[place], tuned), abs(index - middle)) for index, place in enumerate(equals)}
    return ordered[min(ranked, key=lambda place: ranked[place])]


def seed_rates(tuned: Mapping[float, float], seeds: Mapping[float, Iterable[float]], limit: float) -> list[float]:
    """Return the rates that seeds are trained at, one after the other: the first is the best.

    Where a seed was lost at one, the next is the best of the lower ones that did not diverge: a rate that is best for
    one seed, and the shorter training that it was tuned on, may be too high for others.

    Args:
        tuned: What each rate that was tried lost, infinite where the training diverged.
        seeds: What the seeds at a rate lost, by the rate.
        limit: A seed that lost more is lost, as one that diverged is.
    """
    found = [best_rate(tuned)]
    while any(math.isinf(one) or one > limit for one in seeds.get(found[-1], ())):
        lower = {rate: lost for rate, lost in tuned.items() if rate < found[-1] and math.isfinite(lost)}
        if not lower:
            break
        found.append(best_rate(lower))
    return found


def is_at_end(rate: float, tried: Collection[float]) -> bool:
    """Tell whether a rate is the first or the last of those that were tried, so that a better one may lie beyond."""
    return not min(tried, default=rate) < rate < max(tried, default=rate)


def packed(values: np.ndarray) -> str:
    """Return numbers as float16 in base64: half a thousandth of each is lost."""
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def packed_bits(values: np.ndarray) -> str:
    """Return truth values as bits in base64, with their number before them."""
    return f"{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"


def unpacked(text: str) -> np.ndarray:
    """Return what `packed` or `packed_bits` packed."""
    number, _, rest = text.rpartition(":")
    content = base64.b64decode(rest)
    if number:
        return np.unpackbits(np.frombuffer(content, np.uint8), count=int(number)).astype(bool)
    return np.frombuffer(content, "<f2").astype(np.float64)


def tried(tuning: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Return what each rate lost that was tried: less reward, or more loss; infinite where the training diverged."""
    return {result["rate"]: math.inf if result["score"] is None else -result["score"] for result in tuning}
