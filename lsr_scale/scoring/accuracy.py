"""Multiple-choice scores: predictions, accuracy and acc_norm with their standard errors, McNemar's test."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lsr_scale.errors import UserError
from lsr_scale.scoring.paired import mcnemar_p


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one example.

    Attributes:
        id: The example's id.
        answer: 0-based index of the right choice.
        log_likelihoods: Sum of the log-probabilities of each continuation's tokens, in nats.
        choice: The most likely continuation, the first of equals.
        choice_norm: The most likely one per character of the choice.
    """

    id: str
    answer: int
    log_likelihoods: tuple[float, ...]
    choice: int
    choice_norm: int


@dataclass(frozen=True)
class TaskScore:
    """Accuracies in [0, 1] with the standard errors of their means: sample deviation / sqrt(num_examples)."""

    num_examples: int
    accuracy: float
    accuracy_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    predictions: tuple[Prediction, ...] = field(repr=False)

    @classmethod
    def of(cls, predictions: Sequence[Prediction]) -> "TaskScore":
        """Return the scores of predictions."""
        plain = _mean_and_error([p.choice == p.answer for p in predictions])
        normalized = _mean_and_error([p.choice_norm == p.answer for p in predictions])
        return cls(len(predictions), *plain, *normalized, tuple(predictions))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the predictions among them."""
        return asdict(self)


def _mean_and_error(hits: Sequence[bool]) -> tuple[float, float]:
    num, mean = len(hits), sum(hits) / len(hits)
    # the sample variance of zeros and ones is n / (n - 1) * p (1 - p); a single example has none
    return mean, math.sqrt(mean * (1 - mean) / max(1, num - 1))


def mcnemar(before: TaskScore, after: TaskScore) -> tuple[int, int, float]:
    """Compare two scores of the same examples: newly right, newly wrong, exact two-sided p of McNemar's test.

    Raises:
        UserError: The two are not of the same examples in the same order.
    """
    if [p.id for p in before.predictions] != [p.id for p in after.predictions]:
        raise UserError("McNemar's test: expected two scores of the same examples, got different ones")
    both = zip(before.predictions, after.predictions, strict=True)
    pairs = [(old.choice == old.answer, new.choice == new.answer) for old, new in both]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return gained, lost, mcnemar_p(gained, lost)
