"""What runs and the trials of a sweep are compared by, and where their scores are not of one kind."""

from collections.abc import Sequence
from typing import Any, Literal

from lsr_scale.config.methods import METHODS
from lsr_scale.config.run import RunConfig
from lsr_scale.config.training import compared_by, evaluated, training_model

Objective = Literal["loss", "reward"]
OBJECTIVES: tuple[Objective, ...] = ("loss", "reward")

ACCURACIES = "eval_rewards/accuracies"  # the share of pairs whose chosen completion has the higher reward


def evaluates(run: RunConfig) -> bool:
    """Tell whether a run is evaluated on held-out rows while it trains."""
    return run.data.has_validation and run.training["eval_strategy"] != "no"


def metrics_of(run: RunConfig) -> list[str]:
    """Return the metrics that a run's evaluations find."""
    labels = len(run.model.labels) if run.model.labels else run.model.num_labels
    return [f"eval_{name}" for name in evaluated(run.model.task, labels, run.training["method"])]


def objective_of(task: Any, method: Any) -> Objective:
    """Return what training makes better, by which a run is judged: the loss, of GRPO the reward.

    Args:
        task: A run's `model.task`, as it stands in its file, which may be damaged.
        method: Its `training.method`, likewise; None is the default.
    """
    is_known = task == "causal_lm" and isinstance(method, str) and method in METHODS
    return "reward" if is_known and compared_by(task, method) == "eval_reward" else "loss"


def plural(objective: Objective) -> str:
    """Return an objective's name for several values of it."""
    return {"loss": "losses", "reward": "rewards"}[objective]


def score_metric(runs: Sequence[RunConfig], stops: bool) -> str:
    """Return what some runs are compared by, where nobody said.

    That is the loss on held-out rows, of GRPO the reward there, and of preferences where the loss is not defined alike
    the share of pairs in the right order; without held-out rows the mean "accuracy" of their tasks, else the training
    loss, or training reward, of the last steps.

    Args:
        runs: The runs.
        stops: They are compared while they train too, so by evaluations.
    """
    first = runs[0]
    metric = compared_by(first.model.task, first.training["method"])
    if stops or all(evaluates(run) for run in runs):
        has_accuracies = all(ACCURACIES in metrics_of(run) for run in runs)
        return ACCURACIES if has_accuracies and differing_scales(runs) else metric
    if all(run.eval.tasks for run in runs):
        return "accuracy"
    return metric.replace("eval_", "final_")


def differing_scales(runs: Sequence[RunConfig]) -> list[str]:
    """Return the keys, of those that define the loss, or GRPO's reward, in which some runs differ."""
    method = runs[0].training["method"]
    if any(run.training["method"] != method for run in runs):
        return ["training.method"]
    names = METHODS[method].scaled_by if runs[0].model.task == "causal_lm" else ("label_smoothing_factor",)
    return [f"training.{name}" for name in names if any(_value(run, name) != _value(runs[0], name) for run in runs)]


def keys_of_scale(runs: Sequence[RunConfig], metric: str) -> list[str]:
    """Return the keys that define a metric and in which some runs differ, so that their order by it means little.

    Those are of losses, rewards and margins; shares, such as accuracies, are of one kind whatever the loss.
    """
    kind = metric.removeprefix("eval_").removeprefix("final_")
    is_scaled = kind in ("loss", "reward") or (kind.startswith("rewards/") and metric != ACCURACIES)
    return differing_scales(runs) if is_scaled else []


def share_of_right(runs: Sequence[RunConfig]) -> str | None:
    """Return the metric of evaluations that is a share of right answers, or pairs, of all of some runs; None for none.

    It is not the tokens' accuracy, whose tokens depend on the loss too.
    """
    known = (ACCURACIES, "eval_accuracy")
    return next((name for name in known if all(name in metrics_of(run) for run in runs)), None)


def differ_in_rows(runs: Sequence[RunConfig], metric: str) -> bool:
    """Tell whether some runs have a metric of different rows."""
    return any(_scored_rows(run, metric) != _scored_rows(runs[0], metric) for run in runs)


def comparison_notes(runs: Sequence[RunConfig], metric: str) -> list[str]:
    """Return what a user should know before he compares some runs by a metric, a line each."""
    notes, words = [], metric_words(metric)
    if differ_in_rows(runs, metric):
        which = "eval.tasks" if metric == "accuracy" else "held-out rows" if evaluated_by(metric) else "training rows"
        remedy = "" if metric == "accuracy" else "; give all the same data.validation where they are to be compared"
        notes.append(
            f"trials have different {which}, so their order by {words} tells whose are easier as much as which is the "
            f"better trial{remedy}"
        )
    if keys := differing_scales(runs):
        what = plural("reward" if metric.endswith("reward") else "loss")
        differ = f"trials differ in {', '.join(keys)}, so their {what} are not defined alike"
        if metric == ACCURACIES:
            notes.append(f"{differ}: they are compared by {words}, the share of pairs in the right order")
        elif keys_of_scale(runs, metric):
            notes.append(f"{differ}, and their order by {words} means little{_remedy(runs)}")
    return notes


def _remedy(runs: Sequence[RunConfig]) -> str:
    """Return what tells the better of runs whose losses are not defined alike, nothing where there is nothing to do."""
    if share := share_of_right(runs):
        if all(evaluates(run) for run in runs):
            return f"; judge them by {metric_words(share)}"
        lacks_rows = any(not run.data.has_validation for run in runs)
        how = f"{'data.validation_split: 0.05 with ' if lacks_rows else ''}training.eval_strategy: steps"
        if share == ACCURACIES:
            return f"; {how} has them compared by the share of pairs in the right order"
        return f"; {how} tells their {metric_words(share)}"
    has_tasks = runs[0].model.task == "seq_cls" or all(run.eval.tasks for run in runs)  # classifiers can have none
    return "" if has_tasks else "; judge them by eval.tasks"


def metric_words(metric: str) -> str:
    """Return a metric's name for people."""
    words = {
        **{"final_loss": "training loss", "final_reward": "training reward", "accuracy": "mean accuracy"},
        **{ACCURACIES: "eval reward accuracy", "eval_rewards/margins": "eval reward margin"},
    }
    return words.get(metric, metric.replace("_", " "))


def evaluated_by(metric: str) -> bool:
    """Tell whether a metric is one of evaluations while training."""
    return metric.startswith("eval_")


def _scored_rows(run: RunConfig, metric: str) -> Any:
    data = run.data.model_dump()
    if metric == "accuracy":
        return run.eval.model_dump()["tasks"]
    if evaluated_by(metric):
        return data["validation"], data["validation_split"], data["train"] if data["validation_split"] else None
    return data["train"]


def _value(run: RunConfig, name: str) -> Any:
    if name in run.training:
        return run.training[name]
    return training_model(run.model.task, run.training["method"]).model_fields[name].default
