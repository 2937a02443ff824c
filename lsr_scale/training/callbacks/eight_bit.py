"""A run in 8 bits (`training.compute`) watched: which groups of linears stay in bfloat16, what underflows in others."""

import logging
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.fused import (
    compute_errors,
    keep_in_bf16,
    measure_compute_errors,
    reset_underflow_counts,
    underflow_counts,
)
from lsr_scale.fused.eight_bit import to_numbers
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.compute import above, write_errors

logger = logging.getLogger(__name__)

# Steps in which errors may be measured: CUDA graphs, which hold what is decided, begin with the third.
_ATTEMPTS = 2
# Shares of a group's values that underflow, above which a warning is worth it. Of normally distributed values beside
# one outlier per row (a test repeats it) the relative error without the outlier is e4m3's own 2.7 % up to a share of
# 0.2, 2.9 % at 0.4, 3.9 % at 0.7, 7 % at 0.95; in int8 it is 0.9 % at 0.012, the share without outliers, 9 % at 0.125,
# where `compute_tolerance` is nearly reached, and 30 % at 0.4. Real models' largest shares lie below: in e4m3 0.02 of
# inputs and 0.26 of output gradients, in int8 0.03 (benchmarks/LOG.md).
WARN_SHARES = {torch.float8_e4m3fn: 0.5, torch.int8: 0.125}


class EightBitCallback(TrainerCallback):
    """Keeps groups of linears in bfloat16 whose error is too large, logs shares of underflow, and warns of large ones.

    A group (`12.down`) is the linears of a layer that read one input. With `training.keep_in_bf16: auto` the errors of
    its output and of its input gradient are measured in the first step, beside bfloat16, and the larger decides. The
    largest that any process found counts, so all decide alike. A run that resumes decides by what it measured when it
    began.

    Underflow is a value other than zero that has no code of its full precision: in e4m3 a subnormal one or zero, in
    int8 zero. Its shares go into the logs, over all processes, as the groups' median and maximum:
    `underflow_input_max` of activations, `underflow_gradient_max` of output gradients. Goes before the callbacks that
    record the logs.
    """

    def __init__(
        self,
        folder: RunFolder,
        compute: str,
        tolerance: float,
        decides: bool,
        earlier: Mapping[str, float] | None = None,
        say: Any = logger.warning,
    ) -> None:
        """Take how it is decided.

        Args:
            folder: The run's, for `compute.json`.
            compute: "fp8" or "int8".
            tolerance: The largest relative error that a group may have.
            decides: Whether it is decided here, by errors.
            earlier: The errors that the run measured before it was resumed.
            say: Called with what was decided, and each warning.
        """
        self.folder, self.compute, self.tolerance, self.say = folder, compute, tolerance, say
        self.earlier = earlier
        self.attempts = _ATTEMPTS if decides else 0
        self.warned: set[str] = set()

    @property
    def measures(self) -> bool:
        """Whether errors are yet to be measured."""
        return self.attempts > 0 and self.earlier is None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide as the run did when it began."""
        if self.attempts and self.earlier is not None:
            self._decide(kwargs["model"], self.earlier, ", as measured when the run began")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide by the errors of the first step; of the second, where there were some that are not finite."""
        if not self.measures:
            return
        self.attempts -= 1
        errors = _largest(distributed.gather([compute_errors(kwargs["model"])]))
        if self.attempts and not all(map(math.isfinite, errors.values())):
            measure_compute_errors(kwargs["model"])
        else:
            self._decide(kwargs["model"], errors)

    def _decide(self, model: Any, errors: Mapping[str, float], how: str = "") -> None:
        self.attempts, self.earlier = 0, errors
        keep_in_bf16(model, above(errors, self.tolerance))
        if distributed.is_main():
            write_errors(self.folder, self.compute, errors, self.tolerance)
        self.say(f"{self.compute}: {decision(errors, self.tolerance)}{how}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the shares of underflow since the last logs, and warn of groups where it is large, once each."""
        if not logs or "loss" not in logs:
            return
        shares = _shares(kwargs["model"])
        reset_underflow_counts(kwargs["model"])
        for kind in ("input", "gradient"):
            of_kind = [share for name, share in shares.items() if name.endswith(f".{kind}")]
            if of_kind:
                logs[f"underflow_{kind}_median"] = statistics.median(of_kind)
                logs[f"underflow_{kind}_max"] = max(of_kind)
        for dtype, limit in WARN_SHARES.items():
            new = {name: share for name, share in shares.items() if share > limit and self._dtype(name) == dtype}
            new = {name: share for name, share in new.items() if name not in self.warned}
            self.warned |= new.keys()
            if new:
                self.say(f"note: {_warning(new, dtype, self.earlier or {})}")

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a group's codes: of its input, or of its output's gradient, which is always e4m3."""
        is_input = name.endswith(".input")
        return torch.int8 if self.compute == "int8" and is_input else torch.float8_e4m3fn


def decision(errors: Mapping[str, float], tolerance: float) -> str:
    """Return a line on how many groups stay in bfloat16, and where the largest errors are."""
    groups = {name.rpartition(".")[0] for name in errors}
    number = f"{len(above(errors, tolerance))} of {len(groups)} groups of linears stay in bfloat16"
    largest = []
    for product, what in (("output", "outputs"), ("gradient", "input gradients")):
        names = [name for name in errors if name.endswith(f".{product}")]
        if names:
            worst = max(names, key=lambda name: _with_nan_last(errors[name]))
            largest.append(f"{errors[worst]:.2g} in {worst.rpartition('.')[0]}'s {what}")
    if not largest:
        return number
    return f"{number}; largest errors: {', '.join(largest)} (training.compute_tolerance: {tolerance:g})"


def _with_nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _largest(of_processes: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest of the processes' errors by name; NaN where one has that."""
    names = dict.fromkeys(name for errors in of_processes for name in errors)
    found = {name: [errors[name] for errors in of_processes if name in errors] for name in names}
    return {name: max(values, key=_with_nan_last) for name, values in found.items()}


def _shares(model: Any) -> dict[str, float]:
    """Return the share of underflow by group and kind, over all processes."""
    counted = underflow_counts(model)
    if not counted:
        return {}
    own = dict(zip(counted, to_numbers(counted.values()), strict=True))
    of_processes = distributed.gather([own])
    shares = {}
    for name in own:
        below, number = (sum(counts[name][index] for counts in of_processes) for index in (0, 1))
        if number:
            shares[name] = below / number
    return shares


def _warning(shares: Mapping[str, float], dtype: torch.dtype, errors: Mapping[str, float]) -> str:
    """Return a line on the largest of the shares, with the error that its group had when that was measured."""
    name = max(shares, key=lambda one: shares[one])
    group, _, kind = name.rpartition(".")
    what = {"input": "activations", "gradient": "output gradients"}[kind]
    of = f"{group} and {len(shares) - 1} more" if len(shares) > 1 else group
    fate = "are zero in int8, too small" if dtype == torch.int8 else "are too small for e4m3"
    error = errors.get(f"{group}.output" if kind == "input" else name)
    measured = "" if error is None else f" (its error in the first step: {error:.2g})"
    return (
        f"{what} of {of}: {100 * shares[name]:.0f} % of the values {fate} beside the largest of their token{measured}; "
        f"training.keep_in_bf16: [{group}] keeps it in bfloat16"
    )
