"""Logs the condition numbers of LSR-Adapt's sums in training, warns of large ones, and applies the run's guard."""

import logging
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.adapters.condition import (
    Guard,
    KroneckerSum,
    apply_guard,
    conditions,
    ill_conditioned,
    kronecker_sums,
)

logger = logging.getLogger(__name__)


class ConditionCallback(TrainerCallback):
    """Adds gamma's median and maximum by side to the logs (`condition_down_max` ...), and applies the guard.

    All processes act on what the main one measures. Goes before the callbacks that record the logs.
    """

    def __init__(self, tolerance: float, guard: Guard, warn: Any = logger.warning) -> None:
        """Set when to warn and what to do.

        Args:
            tolerance: Relative change of a sum by rounding its factors, above which it is ill-conditioned.
            guard: What is done with those.
            warn: Called with each warning.
        """
        self.guard: Guard = guard
        self.tolerance, self.warn = tolerance, warn
        self.warned: set[tuple[str, str]] = set()
        # found once in training, by a walk over all modules; and which of them are of which side
        self._sums: list[KroneckerSum] | None = None
        self._sides: dict[str, list[int]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the sums anew."""
        self._sums = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, add to the logs, warn, apply the guard."""
        if not logs or "loss" not in logs:
            return
        if self._sums is None:
            self._sums, self._sides = kronecker_sums(kwargs["model"]), {}
            for index, one in enumerate(self._sums):
                self._sides.setdefault(one.side, []).append(index)
        sums = self._sums
        if not sums:
            return
        gammas: Any = distributed.broadcast(conditions(sums))  # ranks may differ in the last digits, and then decide so
        for side, members in self._sides.items():
            of_side = gammas[members]
            logs[f"condition_{side}_median"] = float(of_side.median())
            logs[f"condition_{side}_max"] = float(of_side.max())
        ill = ill_conditioned(sums, gammas, self.tolerance)
        new = [index for index in ill if (sums[index].module, sums[index].side) not in self.warned]
        self.warned |= {(sums[index].module, sums[index].side) for index in new}
        if new:
            self.warn(self._warning([sums[index] for index in new], gammas[new]))
        if self.guard != "warn":
            for index in ill:
                apply_guard(sums[index], self.guard, kwargs.get("optimizer"))
                for parameter in sums[index].parameters:
                    distributed.broadcast_tensor(parameter.data)  # decompositions do not agree to the last digit either

    def _warning(self, sums: list[KroneckerSum], gammas: Tensor) -> str:
        worst, dtype = sums[int(gammas.argmax())], str(sums[0].left.dtype).removeprefix("torch.")
        more = f" and {len(sums) - 1} more" if len(sums) > 1 else ""
        action = {
            "warn": "set training.condition_guard to rescale or fp32, or lower separation_rank",
            "rescale": "their terms are made orthogonal (condition_guard: rescale)",
            "fp32": "they are cast to float32 (condition_guard: fp32)",
        }
        return (
            f"{worst.module}, {worst.side} side{more}: terms cancel, gamma = {float(gammas.max()):.3g}, so that "
            f"rounding to {dtype} may change the update by more than training.condition_tolerance = "
            f"{self.tolerance:g}; {action[self.guard]}"
        )
