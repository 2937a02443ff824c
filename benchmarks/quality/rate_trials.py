"""Trials of one adapter at one rate and seed: how they are called, which rates are still to be tried, kept answers.

Used by `frontier.py` and `grpo_gsm8k.py`, whose results go on from one sitting to the next by these names.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
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
    ordered = sorted(tuned)
    best = min(ordered, key=lambda rate: tuned[rate])
    if len(tuned) >= len(rates) + most_beyond or best not in (ordered[0], ordered[-1]):
        return ()
    step = rates[1] / rates[0]
    return (float(f"{best / step if best == ordered[0] else best * step:.4g}"),)


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
