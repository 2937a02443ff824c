"""Measures the condition of LSR-Adapt's sums while they train, warns, and mends them if the run wants it."""

import logging
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.adapters.condition import Guard, Side, conditions, endangered, mend, sides

logger = logging.getLogger(__name__)


class WatchCondition(TrainerCallback):
    """Logs gamma's median and largest value by side at every logging step, and does what the guard says.

    All processes do what the main one measures. Put before the callbacks that record: the values stand among the logs,
    `condition_down_max` and so on.
    """

    def __init__(self, tolerance: float, guard: Guard, say: Any = logger.warning) -> None:
        self.guard: Guard = guard
        self.tolerance, self.say = tolerance, say
        self.told: set[tuple[str, str]] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, add to the logs, warn, mend."""
        if not logs or "loss" not in logs:
            return
        model = kwargs["model"]
        found = sides(model)
        if not found:
            return
        gammas: Any = distributed.broadcast(conditions(found))  # others' last digits could tip another decision
        for name in dict.fromkeys(side.name for side in found):
            some = gammas[[index for index, side in enumerate(found) if side.name == name]]
            logs[f"condition_{name}_median"] = float(some.median())
            logs[f"condition_{name}_max"] = float(some.max())
        worst = [found[index] for index in endangered(found, gammas, self.tolerance)]
        new = [side for side in worst if (side.module, side.name) not in self.told]
        self.told |= {(side.module, side.name) for side in new}
        if new:
            self.say(self._words(new, gammas[[found.index(side) for side in new]]))
        if self.guard != "warn":
            for side in worst:
                mend(side, self.guard, kwargs.get("optimizer"))
                for parameter in side.parameters:
                    distributed.broadcast_tensor(parameter.data)  # nor do decompositions agree to the last digit

    def _words(self, new: list[Side], gammas: Tensor) -> str:
        first, kind = new[int(gammas.argmax())], str(new[0].left.dtype).removeprefix("torch.")
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        done = {
            "warn": "set training.condition_guard to rescale or fp32, or lower separation_rank",
            "rescale": "their terms are made orthogonal (condition_guard: rescale)",
            "fp32": "they are held in float32 from now on (condition_guard: fp32)",
        }
        return (
            f"{first.module}, {first.name} side{more}: terms cancel, gamma = {float(gammas.max()):.3g}, so that "
            f"rounding to {kind} may change the update by more than training.condition_tolerance = {self.tolerance:g}; "
            f"{done[self.guard]}"
        )
