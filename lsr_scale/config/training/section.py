"""The section's model, of the installed dataclass and what the subjects say; and a section, checked by it."""

import dataclasses
import enum
import functools
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from lsr_scale.config.methods import METHODS, method_of
from lsr_scale.config.optimizers import OWN_OPTIMIZERS
from lsr_scale.config.training.arguments import declaration
from lsr_scale.config.training.compute import RENAMED
from lsr_scale.config.training.evaluation import best_step_defaults, steering_arguments
from lsr_scale.config.training.fields import BOUNDS, DEFAULTS, defaults_of, not_to_set, own_fields
from lsr_scale.config.training.optimization import ROWS_PER_STEP
from lsr_scale.config.training.subject import Task
from lsr_scale.config.training.yaml_types import Flag, as_written, buildable, members_of, narrowed, yaml_type


class TrainingFields(BaseModel):
    """What the models of both tasks share; `training_model` adds the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@functools.cache
def training_model(task: Task, method: str = "sft") -> type[TrainingFields]:
    """Return the model of the `training` section: the installed dataclass, our defaults in place of its own."""
    source = declaration(task, method)
    hints = get_type_hints(source)
    defaults, left_out = defaults_of(task, method), not_to_set(method)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        if field.init and field.name not in left_out:
            more = OWN_OPTIMIZERS if field.name == "optim" else ()
            kind = buildable(yaml_type(hints[field.name], [*(field.metadata.get("choices") or ()), *more]))
            if task == "causal_lm":
                kind = narrowed(kind, METHODS[method].choices.get(field.name), field.name in METHODS[method].filled)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = field.metadata.get("help", "").replace("%%", "%")
            fields[field.name] = _field(field.name, kind, defaults.get(field.name, default), text)
    for old, new in RENAMED.items():
        kind, described = fields.get(new, fields[old])
        kind = kind if old.endswith("_kwargs") else Flag | None  # pyright: ignore[reportOperatorIssue]
        fields[old] = (kind, Field(default=DEFAULTS.get(old), description=described.description))
        fields[new] = (kind, Field(default=None, description=f"The name of {old} from transformers 5.23 on."))
    if task == "causal_lm" and method == "sft":
        text = "Supervise what the assistant says, its end tokens included, and no other turn. null: in conversations."
        kind = Flag | None  # pyright: ignore[reportOperatorIssue]
        fields["assistant_only_loss"] = (kind, Field(default=None, description=text))
    elif task == "seq_cls":
        text = "Longest sequence in tokens; longer ones are truncated."
        fields["max_length"] = _field("max_length", int | None, defaults["max_length"], text)
    for name, (kind, text) in own_fields(task, method).items():
        fields[name] = _field(name, Flag if kind is bool else kind, defaults[name], text)
    return create_model("TrainingSection", __base__=TrainingFields, **fields)


def check_training(values: Any, task: Task, context: Any = None) -> dict[str, Any]:
    """Return the section as written, checked, with our defaults for what it leaves out.

    Args:
        values: The section.
        task: The model's.
        context: Pydantic's: under "folder" what the paths of rewards are relative to.

    Raises:
        pydantic.ValidationError: for unknown names and wrong types or values.
        ValueError: for the two names of a renamed field, set differently.
    """
    method = method_of(values)
    checked = training_model(task, method).model_validate(values, context=context)
    written = {name: as_written(values[name], getattr(checked, name)) for name in values}
    for name, value in written.items():
        if name.endswith("_kwargs") and isinstance(value, str) and not value.lstrip().startswith("{"):
            raise ValueError(f"{name}: expected a mapping, such as {{key: value}}, got {value!r:.60}")
    values = dict(written)
    for old, new in RENAMED.items():
        if new in values:
            if values.get(old, values[new]) != values[new]:
                raise ValueError(f"{old} and {new} are two names of one field, set to different values; keep one")
            values[old] = values.pop(new)
    filled = {**defaults_of(task, method), **best_step_defaults(values), **values}
    filled |= steering_arguments(filled)
    if (max_steps := filled.get("max_steps", -1)) != -1 and max_steps < 1:
        raise ValueError(f"max_steps: expected a number of steps, or -1 for num_train_epochs, got {max_steps}")
    if (rows := filled["per_device_train_batch_size"] * filled["gradient_accumulation_steps"]) > ROWS_PER_STEP:
        raise ValueError(
            f"per_device_train_batch_size times gradient_accumulation_steps is {rows:,} rows a step; expected at most "
            f"{ROWS_PER_STEP:,}"
        )
    checkpointing, memory = filled["gradient_checkpointing"], filled["memory"]
    if checkpointing is not None and memory != "auto" and checkpointing != (memory == "save"):
        name = next(name for pair in RENAMED.items() for name in pair if name in written)
        raise ValueError(f"memory: {memory} and {name}: {checkpointing} contradict each other; keep one")
    return filled


def _field(name: str, kind: Any, default: Any, text: str) -> tuple[Any, Any]:
    if name in BOUNDS:
        numbers = [member for member in members_of(kind) if member in (int, float)]
        bounded = Annotated[Union[tuple(numbers)], Field(**BOUNDS[name])]  # noqa: UP007  # pyright: ignore
        words = Literal[default] if isinstance(default, str) else str  # beside a number text is one word, such as auto
        rest = [words if member is str else member for member in members_of(kind) if member not in numbers]
        kind = Union[(bounded, *rest)]
    return kind, Field(default=default.value if isinstance(default, enum.Enum) else default, description=text)
