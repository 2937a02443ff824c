"""How the next token is chosen: greedily, or drawn by temperature, top_p and top_k."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lsr_scale.errors import UserError, quoted


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: When to stop at the latest.
        temperature: 0 takes the most likely token; above, tokens are drawn from probabilities sharpened (below 1) or
            flattened by it. None: 1 where `top_p`, `top_k`, `min_p` or `seed` asks for drawing, else 0.
        top_p: Draw from the most likely tokens that together have this probability (arXiv 1904.09751).
        top_k: Draw from so many of the most likely tokens.
        min_p: Draw from tokens at least so likely as this times the most likely one (arXiv 2407.01082).
        repetition_penalty: Divides the logits of tokens that were there already (arXiv 1909.05858); 1 is off.
        seed: Of the draws; None draws differently each time.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, and fill in the temperature."""
        _check_number("max_new_tokens", self.max_new_tokens, int, 1, 10**9, "a whole number from 1 on")
        _check_number("temperature", self.temperature, float, 0, 100, "a number from 0, the most likely token, to 100")
        _check_number("top_p", self.top_p, float, 1e-6, 1, "a number above 0, up to 1")
        _check_number("top_k", self.top_k, int, 1, 10**9, "a whole number from 1 on")
        _check_number("min_p", self.min_p, float, 0, 1, "a number from 0 to 1")
        _check_number("repetition_penalty", self.repetition_penalty, float, 0.01, 100, "a number from 0.01 to 100")
        _check_number("seed", self.seed, int, 0, 2**63 - 1, "a whole number from 0 on")
        given = [name for name in ("top_p", "top_k", "min_p", "seed") if getattr(self, name) is not None]
        if self.temperature is None:
            object.__setattr__(self, "temperature", 1.0 if given else 0.0)
        elif self.temperature == 0 and given:
            raise UserError(
                f"{given[0]}: has no effect at temperature 0, which takes the most likely token; leave one of them out"
            )

    @cached_property
    def _processors(self) -> LogitsProcessorList:
        """Transformers' own processors, in its `generate`'s order."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(float(self.temperature or 0)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            found.append(MinPLogitsWarper(float(self.min_p)))
        return found

    def next_tokens(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next token of each row `[B]`, with the draws that transformers' `generate` would make.

        Args:
            ids: The tokens so far, `[B, T]`.
            logits: `[B, vocabulary]`, float32; overwritten.
        """
        scores: Any = self._processors(ids, logits)  # pyright: ignore[reportArgumentType]
        if not self.temperature:
            return scores.argmax(-1)
        likely = scores.softmax(-1)
        # as torch.multinomial draws one, without its checks, for which the host would wait for the GPU twice
        return likely.div_(scores.exponential_()).argmax(-1)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for transformers' `generate`; the model's own defaults are not asked."""
        values: dict[str, Any] = {"do_sample": False, "repetition_penalty": float(self.repetition_penalty)}
        if self.temperature:
            values |= {"do_sample": True, "temperature": float(self.temperature)}
            values |= {"top_p": float(self.top_p or 1), "top_k": self.top_k or 0}
            values |= {"min_p": float(self.min_p)} if self.min_p else {}
        return values


def _check_number(name: str, value: Any, kind: type, least: float, most: float, expected: str) -> None:
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and least <= value <= most):
        raise UserError(f"{name}: expected {expected}, got {quoted(value)}")
