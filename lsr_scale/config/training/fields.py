"""What all subjects together say of the section's fields."""

from typing import Any, Literal

from lsr_scale.config.methods import METHODS
from lsr_scale.config.training.completions import COMPLETIONS
from lsr_scale.config.training.compute import COMPUTE
from lsr_scale.config.training.evaluation import EVALUATION
from lsr_scale.config.training.guards import GUARDS
from lsr_scale.config.training.loading import LOADING
from lsr_scale.config.training.optimization import OPTIMIZATION
from lsr_scale.config.training.processes import PROCESSES
from lsr_scale.config.training.rows import ROWS
from lsr_scale.config.training.saving import SAVING
from lsr_scale.config.training.subject import Subject, Task

_RUN = Subject(
    defaults={"method": "sft", "output_dir": None},  # null: a folder of its own under runs/
    own={
        "method": (
            Literal[tuple(METHODS)],  # pyright: ignore
            "What is learned, by TRL's trainer of that name: 'sft' (supervised fine-tuning), 'dpo' or 'orpo' (from "
            "chosen and rejected completions), 'kto' (from completions that are desirable or not), 'grpo' (from what "
            "the model's own completions are worth).",
        ),
    },
)
# in the order in which a resolved run shows their defaults
SUBJECTS = (_RUN, OPTIMIZATION, COMPUTE, GUARDS, EVALUATION, SAVING, ROWS, COMPLETIONS, PROCESSES, LOADING)

DEFAULTS: dict[str, Any] = {name: value for subject in SUBJECTS for name, value in subject.defaults.items()}
TASK_DEFAULTS: dict[Task, dict[str, Any]] = {
    # Without prediction_loss_only, evaluation keeps the logits of the whole vocabulary for every token.
    "causal_lm": {"prediction_loss_only": True},
    "seq_cls": {"max_length": 512},
}
BOUNDS: dict[str, dict[str, float]] = {name: limits for one in SUBJECTS for name, limits in one.bounds.items()}
OWN_FIELDS: dict[str, tuple[Any, str]] = {name: told for subject in SUBJECTS for name, told in subject.own.items()}
OWNED: dict[str, str] = {name: remedy for subject in SUBJECTS for name, remedy in subject.owned.items()}


def defaults_of(task: Task, method: str) -> dict[str, Any]:
    """Return what a run of a task and a method gets where its file says nothing and we have something to say."""
    return {**DEFAULTS, **TASK_DEFAULTS[task], **(METHODS[method].defaults if task == "causal_lm" else {})}


def own_fields(task: Task, method: str) -> dict[str, tuple[Any, str]]:
    """Return the fields of a task and a method that neither TRL nor transformers has: type and description."""
    return {**OWN_FIELDS, **(METHODS[method].own if task == "causal_lm" else {})}


def not_to_set(method: str) -> dict[str, str]:
    """Return the fields that no file of a method sets, with what to do instead."""
    return OWNED | METHODS[method].unused
