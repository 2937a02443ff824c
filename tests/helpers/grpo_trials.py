"""Made-up results of `benchmarks.quality.grpo_gsm8k`: adapters with accuracies that a test gives, and their tuning."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import trials
from benchmarks.quality.grpo_gsm8k import Suite, Trial
from benchmarks.quality.grpo_rows import RATES, SIZES
from benchmarks.quality.rate_trials import packed_bits
from benchmarks.quality.trials import TUNING_SEED

SUITE = Suite(Path("work"), "qwen", "folder", tuning_steps=20, steps=60, schedule="constant")
QUESTIONS = 1_000
ENV = {"gpus": ["NVIDIA X"]}


def answers(accuracy: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Return whether each question is answered rightly: the first of them, and a share of all by chance."""
    draw = np.random.default_rng(seed)
    right = np.arange(QUESTIONS) < accuracy * QUESTIONS
    return np.where(draw.random(QUESTIONS) < noise, draw.random(QUESTIONS) < accuracy, right)


def _about(training: str, row: str, suite: Suite) -> dict[str, Any]:
    about = {**suite.about, "row": row, "training": training, "jobs": 2, "env": ENV, "command": "python -m x"}
    return {**about, "trainable_parameters": int(SIZES[row])}


def base(accuracy: float = 0.2, suite: Suite = SUITE) -> dict[str, dict[str, Any]]:
    """Return the result of no adapter."""
    result = {**suite.about, "row": "base", "accuracy": accuracy, "right": packed_bits(answers(accuracy))}
    return {f"{suite.prefix}-base": {**result, "jobs": 2, "env": ENV, "command": "python -m x"}}


def tuned(
    training: str, row: str, scores: dict[float, float | None] | None = None, suite: Suite = SUITE
) -> dict[str, dict[str, Any]]:
    """Return the results of a row's rates, by default the three with the best in the middle."""
    if scores is None:
        scores = dict(zip(RATES[training][row], (0.1, 0.3, 0.2) if training == "grpo" else (-3, -1, -2), strict=True))
    return {
        f"{suite.prefix}-{Trial(training, row, TUNING_SEED, rate).name}": {
            **_about(training, row, suite),
            **{"seed": TUNING_SEED, "rate": rate, "score": score},
        }
        for rate, score in scores.items()
    }


def seeds(
    training: str,
    row: str,
    accuracy: float | None,
    number: int = 2,
    noise: float = 0.0,
    cut: float | None = 0.1,
    suite: Suite = SUITE,
) -> dict[str, dict[str, Any]]:
    """Return the results of a row's seeds at its middle rate; without an accuracy the last of them diverged."""
    rate, found = RATES[training][row][1], {}
    for seed in range(number):
        result = {**_about(training, row, suite), "seed": seed, "rate": rate}
        if accuracy is None and seed == number - 1:
            result |= {"score": None, "error": "training diverged"}
        else:
            right = answers(accuracy or 0.2, noise, seed + len(row) * 10)
            curve = {"loss": [1.0, 0.9, 0.8], "s": [2.0, 4.0, 6.0]}
            if training == "grpo":
                curve |= {"reward": [0.1, 0.2, 0.3], "tokens": [90.0, 95.0, 100.0]}
                curve |= {} if cut is None else {"cut": [cut] * 3}
            result |= {"score": 0.3 if training == "grpo" else -0.8, "curve": curve}
            result |= {"accuracy": float(right.mean()), "right": packed_bits(right)}
        found[f"{suite.prefix}-{Trial(training, row, seed, rate).name}"] = result
    return found


def write(folder: Path, *found: dict[str, dict[str, Any]]) -> None:
    """Add results to a folder."""
    for results in found:
        for name, result in results.items():
            trials.add(folder, name, result)
