"""Evaluation on `data.validation` while training: when, what it finds, and that training may end by it."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lsr_scale.config.methods import METHODS, method_of
from lsr_scale.config.training.saving import SAVING
from lsr_scale.config.training.subject import Subject, Task

# What an evaluation on data.validation finds. A classifier's depends on its number of outputs: see `evaluated`.
_CLASSES = ("accuracy", "f1", "f1_macro", "matthews_correlation")
_SCORES = ("pearson", "spearmanr")
_OF_PREFERENCES = ("rewards/accuracies", "rewards/margins")
EVALUATED = tuple(f"eval_{name}" for name in ("loss", "reward", *_CLASSES, *_SCORES, *_OF_PREFERENCES))

STEERED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # whose rate follows metric_for_best_model

_LOSS = "eval_loss"
_NOT_USED = "the trainer does not read it; what runs follows from the sections data and eval"


class EarlyStopping(BaseModel):
    """When training ends early."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    patience: int = Field(3, ge=1, le=10**6, description="Evaluations in a row without improvement that end training.")
    threshold: float = Field(0.0, ge=0, le=1e6, description="An improvement is by more than this.")


EVALUATION = Subject(
    defaults={"early_stopping": None},
    bounds={
        "eval_accumulation_steps": {"ge": 1, "le": 10**9},
        "eval_steps": {"gt": 0, "le": 10**9},
        "eval_delay": {"ge": 0, "le": 10**9},
    },
    own={
        "early_stopping": (
            EarlyStopping | None,
            "End training where metric_for_best_model (eval_loss, of grpo eval_reward) no longer improves: {patience, "
            "threshold}. Evaluations and saves then coincide, and the best checkpoint's adapter is kept, if the run "
            "says nothing else.",
        ),
    },
    owned=dict.fromkeys(("do_train", "do_eval", "do_predict"), _NOT_USED),
)


def evaluated(task: Task, num_labels: int | None, method: str = "sft") -> tuple[str, ...]:
    """Return what an evaluation during training finds, without the `eval_` before each: metric_for_best_model's values.

    Args:
        task: The model's.
        num_labels: A classifier's outputs; one is a regression. None: what any number of them may have.
        method: How a language model is trained.
    """
    if task == "causal_lm":
        return METHODS[method].evaluated
    if num_labels is None:
        return "loss", *_CLASSES, *_SCORES
    if num_labels == 1:
        return "loss", *_SCORES
    return "loss", *(name for name in _CLASSES if name != "f1" or num_labels == 2)  # F1 of class 1, of two


def compared_by(task: Task, method: str) -> str:
    """Return the metric of evaluations that tells which is the best, where a run names none."""
    return f"eval_{METHODS[method].objective}" if task == "causal_lm" else _LOSS


def lower_is_better(metric: str) -> bool:
    """Tell whether the best value of a metric is the lowest."""
    return metric.endswith(("loss", "entropy", "kl"))


def best_step_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run has, where it says nothing, whose kept step, end or rate goes by a metric of evaluations.

    Where it may stop early, what is evaluated is saved, so that the best can be kept.
    """
    metric = compared_by("causal_lm", method_of(values))  # a classifier's is the loss too
    if values.get("early_stopping") is None:
        has_use = values.get("load_best_model_at_end") or values.get("lr_scheduler_type") in STEERED_SCHEDULES
        return {"metric_for_best_model": metric} if has_use and metric != _LOSS else {}  # transformers' is the loss
    saves = values.get("save_strategy", SAVING.defaults["save_strategy"])
    strategy = values.get("eval_strategy", saves if saves in ("steps", "epoch") else "steps")
    every = values.get("eval_steps", values.get("save_steps", SAVING.defaults["save_steps"]))
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "eval_strategy": strategy,
        "save_strategy": strategy,
        **({"eval_steps": every, "save_steps": every} if strategy == "steps" else {}),
    }


def steering_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a schedule that follows a metric, where its best value is the highest.

    The schedules' own `mode` is min: they would lower the rate as a reward, or an accuracy, rises.
    """
    arguments, greater = values.get("lr_scheduler_kwargs") or {}, values.get("greater_is_better")
    if greater is None:
        greater = not lower_is_better(values.get("metric_for_best_model") or _LOSS)
    if values.get("lr_scheduler_type") not in STEERED_SCHEDULES or not greater or not isinstance(arguments, dict):
        return {}
    return {"lr_scheduler_kwargs": {"mode": "max", **arguments}}
