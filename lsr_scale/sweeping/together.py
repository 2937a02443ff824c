"""How many trials of a sweep share a step: as many as fit, and as it pays, by a few steps that are measured.

What a trial's step takes alone is that of its own trainer, with CUDA graphs where it has them.
"""

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from lsr_scale.config import RunConfig
from lsr_scale.config.comparison import differ_in_rows
from lsr_scale.config.trials import Sweep, TrialPlan
from lsr_scale.errors import UserError, without_advice
from lsr_scale.planning.together import plan_together
from lsr_scale.run.folder import RunFolder
from lsr_scale.sweeping.bases import Bases
from lsr_scale.training.assembly import adapt, build_trainer
from lsr_scale.training.callbacks.memory import max_forward_tokens
from lsr_scale.training.shared import Shared
from lsr_scale.training.steps.joint import JointStep, Member
from lsr_scale.training.steps.meeting import Meet
from lsr_scale.training.steps.sharing import (
    alone_reasons,
    alone_words,
    base_fallback_reason,
    runs_fused,
    sharing_fallback_reason,
)
from lsr_scale.training.trial_rows import TrialRows

LEAST_GAIN = 0.05  # by which the time a trial has to fall for twice as many to share a step
_WARM_UP, _TIMED = 1, 1  # steps: on a CPU one of several trials may take a minute
_WARM_UP_GPU, _TIMED_GPU = 4, 6  # the first ones compile
MOST_OF_A_SWEEP = 0.2  # of its trials' steps may go into measuring; else nothing is measured
UNMEASURED = 8  # trials that share a step then, at most


@dataclass(frozen=True)
class Choice:
    """How many trials share a step, and why, for the user."""

    number: int
    why: str


@dataclass(frozen=True)
class FirstBatches:
    """A trial's first batches, as its trainer makes them, and what is known of all; None where that is unknown.

    Attributes:
        batches: The batches.
        most_tokens: Tokens that a batch can have at most.
    """

    batches: list[dict[str, Any]]
    most_tokens: int | None


def choose(sweep: Sweep, plans: Sequence[TrialPlan], bases: Bases, rows: TrialRows) -> Choice:
    """Return how many of some trials share a step, of those that can; the others are trained alone.

    Args:
        sweep: The sweep, whose `together` decides where it is a number.
        plans: The trials that are to be trained.
        bases: Where their base is.
        rows: Reads their rows.

    Raises:
        UserError: where the base cannot be loaded, or `together` is a number and trials cannot share steps.
    """
    wanted = sweep.section.together
    if wanted == 1 or len(plans) < 2:
        return Choice(1, "")
    alone = alone_reasons({plan.name: plan.run for plan in plans})
    choice = _of_all(sweep, [plan for plan in plans if plan.name not in alone], bases, rows)
    words = "; ".join(filter(None, (choice.why, alone_words(alone))))
    return replace(choice, why=words) if choice.number > 1 else choice


def _of_all(sweep: Sweep, plans: Sequence[TrialPlan], bases: Bases, rows: TrialRows) -> Choice:
    """Return the choice for trials of which all can share steps, or none."""
    wanted = sweep.section.together
    reason = sharing_fallback_reason([plan.run for plan in plans])
    if reason is None:
        reason = base_fallback_reason(bases.of(plans[0].run))
    if reason is not None:
        return Choice(1, f"trials are trained one after the other, as they cannot share steps: {reason}")
    # those that run fused share no step with those that cannot
    kinds = [
        [one for one in plans if runs_fused(one.run, torch.cuda.is_available()) == fused] for fused in (True, False)
    ]
    plans = max(kinds, key=len)
    num_trials = len(plans)
    if num_trials < 2:
        return Choice(1, "trials are trained one after the other: one runs fused, the other cannot")
    if wanted != "auto":
        return Choice(min(wanted, num_trials), "")
    first, why = None, ""
    try:
        first = _first_batches(plans[0], bases, rows)
    except (UserError, torch.OutOfMemoryError) as error:
        why = _nothing_measured(plans[0], error)
    most = _most_that_fit(sweep, plans, first)
    if most < 2:
        return Choice(1, "trials are trained one after the other: no more than one fits")
    if first is not None:
        try:
            steps, measured = num_trials * _num_steps(plans[0].run, rows), sum(_numbers(most)) * sum(_num_timed())
            if measured <= MOST_OF_A_SWEEP * steps:
                return _measured(plans, bases, rows, most, first)
            why = f"measuring what pays would take {measured:,} steps of a trial, and all take {steps:,}"
        except UserError as error:
            why = _nothing_measured(plans[0], error)
    number = min(most, UNMEASURED)
    return Choice(number, f"{number} trials share a step: {why}")


def _nothing_measured(first: TrialPlan, error: Exception) -> str:
    """Return why, where the first trial cannot be trained; the whole error will stand in its row."""
    return f"nothing was measured, as {first.name} cannot be trained: {without_advice(str(error))}"


def _most_that_fit(sweep: Sweep, plans: Sequence[TrialPlan], first: FirstBatches | None) -> int:
    """Return how many fit the memory that is free now, by the plan of the largest; what memory says itself comes later.

    What the plan cannot count does not limit them.
    """
    with suppress(UserError):
        planned = plan_together(sweep if first is None else _of_real_rows(sweep, first))
        if planned.one.traced:
            if torch.cuda.is_available():
                most = planned.most(torch.cuda.get_device_properties(0).total_memory / 2**30)
            else:
                left = psutil.virtual_memory().available / 2**30 - planned.one.memory_gib.activations
                most = int(left / planned.further_gib)
            return max(1, min(len(plans), most))
    return len(plans)


def _of_real_rows(sweep: Sweep, first: FirstBatches) -> Sweep:
    """Return a sweep of which a plan counts rows as long as those of the largest batch that there can be.

    Rows are often far shorter than max_length, and where that is null a plan can only suppose how long they are.
    """
    runs = [trial.run for trial in sweep.trials]
    if first.most_tokens is None or differ_in_rows(runs, "final_loss"):
        return sweep  # another trial's may be longer

    def shorter(trial: TrialPlan) -> TrialPlan:
        training = trial.run.training
        length = math.ceil((first.most_tokens or 0) / training["per_device_train_batch_size"])
        return replace(trial, run=trial.run.model_copy(update={"training": {**training, "max_length": length}}))

    return replace(sweep, trials=[shorter(trial) for trial in sweep.trials])


def _measured(plans: Sequence[TrialPlan], bases: Bases, rows: TrialRows, most: int, first: FirstBatches) -> Choice:
    """Return the choice by the time that its own step, and a joint step of 2, 4, ... trials, take a trial.

    A joint step costs something that its trials share, so two may gain nothing where eight do: what ends the search is
    that two numbers, one after the other, are not faster.
    """
    began, seconds = time.monotonic(), dict[int, float]()
    best, slower, ended = 1, 0, f"no more than {most} fit" if most < len(plans) else "there are no more"
    for number, of_a_trial in _times(plans, bases, rows, most, first):
        if of_a_trial is None:
            ended = f"{number} do not fit"
            break
        seconds[number] = of_a_trial
        if number == 1 or of_a_trial <= (1 - LEAST_GAIN) * seconds[best]:
            best, slower = number, 0
            continue
        slower += 1
        if slower == 2:
            ended = f"more are not {100 * LEAST_GAIN:.0f} % faster"
            break
    measured = ", ".join(
        f"{1000 * of_a_trial:.1f} {f'in one of {number}' if number > 1 else 'ms alone'}"
        for number, of_a_trial in seconds.items()
    )
    share = f"{best} trials share a step" if best > 1 else "trials are trained one after the other"
    took = f"measured in {time.monotonic() - began:.0f} s"
    return Choice(best, f"{share}: a step takes a trial {measured}; {ended} ({took})")


def _numbers(most: int) -> list[int]:
    numbers = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return numbers if numbers[-1] == most else [*numbers, most]


def _num_timed() -> tuple[int, int]:
    """Return how many steps are measured: for warm-up, and timed."""
    return (_WARM_UP_GPU, _TIMED_GPU) if torch.cuda.is_available() else (_WARM_UP, _TIMED)


def _num_steps(run: RunConfig, rows: TrialRows) -> int:
    """Return how many steps a run has, packed rows counted as if they were not."""
    training = run.training
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    of_a_step = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return math.ceil(len(rows.read(run).train) / of_a_step * training["num_train_epochs"])


def _times(
    plans: Sequence[TrialPlan], bases: Bases, rows: TrialRows, most: int, first: FirstBatches
) -> Iterator[tuple[int, float | None]]:
    """Yield numbers of trials and the seconds that a step takes one of so many, None where memory ran out."""
    run = plans[0].run
    models: list[Any] = []
    for number in _numbers(most):
        found: float | None = None
        try:
            if number == 1:
                found = _seconds_alone(plans[0], bases, rows)
            else:
                while len(models) < number:
                    models.append(adapt(plans[len(models)].run, bases.copy(run))[0].train())
                found = _joint_seconds(JointStep(bases.of(run), run), models, first) / number
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
        for model in models:
            model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield number, found
        if found is None:
            return


def _seconds_alone(plan: TrialPlan, bases: Bases, rows: TrialRows) -> float:
    """Return the median of the seconds that a trial's own trainer takes for forward and backward pass."""
    warm_up, timed = _num_timed()
    changes = {"max_steps": warm_up + timed, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    changes |= {"load_best_model_at_end": False, "logging_steps": warm_up + timed, "gradient_accumulation_steps": 1}
    changes |= {"learning_rate": 0.0}  # a rate that diverges is found out by its own trial
    with TemporaryDirectory() as folder:
        trainer = _trainer(plan, bases, rows, folder, changes, meet=None)
        seconds: list[float] = []
        step = trainer.training_step

        def timed_step(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            loss = step(*args, **options)
            seconds.append(_since(began))
            return loss

        trainer.training_step = timed_step
        trainer.train()
    return statistics.median(seconds[warm_up:])


def _trainer(
    plan: TrialPlan, bases: Bases, rows: TrialRows, folder: str, changes: dict[str, Any], meet: Meet | None
) -> Any:
    training = {**plan.run.training, **changes, "output_dir": folder}
    run = plan.run.model_copy(update={"training": training})
    if run.adapter.options.get("init") == "gradient":  # which takes a step as long
        run = run.model_copy(update={"adapter": run.adapter.model_copy(update={"init": "zero"})})
    shared = Shared(base=bases.copy, meet=meet, rows=rows)
    return build_trainer(run, RunFolder(Path(folder)), data=rows.read(plan.run), shared=shared)


def _joint_seconds(step: JointStep, models: Sequence[Any], first: FirstBatches) -> float:
    def run(batch: dict[str, Any]) -> None:
        step.run([Member(model, batch, most_tokens=first.most_tokens) for model in models])

    return _seconds(run, first.batches)


def _first_batches(plan: TrialPlan, bases: Bases, rows: TrialRows) -> FirstBatches:
    """Return the first batches of a trial.

    Raises:
        UserError: where its trainer cannot be made.
    """
    with TemporaryDirectory() as folder:
        trainer = _trainer(plan, bases, rows, folder, {}, _nobody_meets)
        loader = iter(trainer.get_train_dataloader())
        batches = [batch for _, batch in zip(range(_TIMED_GPU), loader, strict=False)]
        return FirstBatches(batches, max_forward_tokens(trainer))


def _nobody_meets(member: Any) -> Any:
    raise AssertionError("its trainer only makes batches")


def _seconds(step: Callable[[dict[str, Any]], Any], batches: Sequence[dict[str, Any]]) -> float:
    """Return the median of the seconds that a step takes."""
    warm_up, timed = _num_timed()
    seconds = []
    for index in range(warm_up + timed):
        began = time.perf_counter()
        step(batches[index % len(batches)])
        seconds.append(_since(began))
    return statistics.median(seconds[warm_up:])


def _since(began: float) -> float:
    """Return the seconds since a moment, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
