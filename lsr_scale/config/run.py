"""The run as pydantic models: read a YAML file, apply `--set`, check all that needs no weights, write it back."""

import functools
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lsr_scale.config import yaml_text
from lsr_scale.config.bounds import out_of_bounds
from lsr_scale.config.conflicts import conflicts
from lsr_scale.config.messages import explain, raise_problems
from lsr_scale.config.methods import METHODS
from lsr_scale.config.sections import (
    ADAPTER_SECTIONS,
    AnyAdapter,
    DataSection,
    DeepSpeedSection,
    EvalSection,
    ModelSection,
    Section,
    SourceSection,
)
from lsr_scale.config.shipped import find_run
from lsr_scale.config.sweep import SweepSection
from lsr_scale.config.training import EarlyStopping, Task, check_training, training_kwargs, training_model
from lsr_scale.errors import UserError, quoted


class RunConfig(Section):
    """A run. Sections left out, or left empty, keep their defaults."""

    model: ModelSection
    adapter: AnyAdapter = Field(description="The adapter method and its options.")
    data: DataSection
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of TRL's class of the method (trl.SFTConfig) or of transformers.TrainingArguments, by "
        "its own name.",
    )
    deepspeed: DeepSpeedSection = DeepSpeedSection.model_validate({})
    eval: EvalSection = EvalSection.model_validate({})

    def with_model(self, **values: Any) -> Self:
        """Return the run with other values in its section model, which are not checked."""
        return self.model_copy(update={"model": self.model.model_copy(update=values)})

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """A heading with nothing under it is null in YAML."""
        return {k: {} if v is None else v for k, v in data.items()} if isinstance(data, dict) else data

    @field_validator("training", mode="before")
    @classmethod
    def _check_training(cls, values: Any, info: ValidationInfo) -> Any:
        model = info.data.get("model")
        task = model.task if model else "causal_lm"
        return check_training(values, task, info.context) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if "eval_strategy" not in self.training:
            self.training["eval_strategy"] = "epoch" if self.data.has_validation else "no"
        raise_problems(list(conflicts(self)))
        return self


def load_run(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Return the run that a YAML file describes.

    Args:
        path: The file, or the name of one that comes with the package (`shipped.find_run`).
        overrides: Assignments such as `training.learning_rate=1e-3`, applied in order; or values by such keys, as
            `with_overrides` takes them.

    Raises:
        UserError: naming every problem with its line, what was expected, and what to do.
    """
    return read_run(path, overrides)[0]


def read_run(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run that a YAML file describes, as `load_run`, and the file's own sections with the overrides."""
    data, places = read_sections(path, overrides)
    if "sweep" in data:
        raise UserError(
            f"{places[('sweep',)]}: sweep: these are several runs, and one is expected here; all of them: lsr-scale "
            f"sweep {shlex.quote(str(path))}; one: lsr-scale train trials/NAME/config.yaml of the sweep's folder"
        )
    path = find_run(path)
    return validate(data, str(path), places, path.parent), data


def read_sections(
    path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> tuple[dict[str, Any], yaml_text.Places]:
    """Return the sections of a run's file as they stand there, with the overrides, and where each value stands.

    Raises:
        UserError: for what is no YAML, or no sections.
    """
    path = find_run(path)
    data, places = yaml_text.parse(yaml_text.read(path), str(path))
    if not isinstance(data, dict):
        found = "nothing but comments" if data is None else type(data).__name__
        raise UserError(
            f"{path}: expected the sections {', '.join(RunConfig.model_fields)}, sweep at the top, each 'name:' on its "
            f"own line, got {found}"
        )
    if isinstance(overrides, Mapping):
        with_overrides(data, overrides, places)
    else:
        yaml_text.override(data, places, overrides, shorthand="path")
    return data, places


def with_overrides(
    data: dict[str, Any], overrides: Mapping[str, Any], places: yaml_text.Places | None = None
) -> dict[str, Any]:
    """Return a run's data with some of its values replaced, in place.

    Args:
        data: The sections.
        overrides: Values by path, `{"training.learning_rate": 1e-3}`, or by section, `{"training": {"learning_rate":
            1e-3}}`, which leaves the others of that section as they are; paths and tuples may stand for text and lists.
        places: Where values stand.

    Raises:
        UserError: for a key that is no text, or a path through something that is no container.
    """
    known = {} if places is None else places
    for key, value in overrides.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise UserError(f"overrides: expected keys such as 'training.learning_rate', got {quoted(key)}")
        values = {key: value}
        if key in RunConfig.model_fields and isinstance(value, Mapping):
            values = {f"{key}.{name}": part for name, part in value.items()}
        for name, part in values.items():
            yaml_text.assign(data, known, yaml_text.keys_of(name), plain(part), f"overrides[{name!r}]", "path")
    return data


def plain(value: Any) -> Any:
    """Return a value as a YAML file would give it: paths as text, tuples as lists, NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def run_from_dict(data: Mapping[str, Any], where: str = "run") -> RunConfig:
    """Return the run that a mapping describes.

    Raises:
        UserError: naming every problem; `where` says in what.
    """
    return validate(dict(data), where, {}, Path())


def dump_yaml(run: RunConfig) -> str:
    """Return the resolved run as YAML: every value, so that it stays what it was when defaults change."""
    return yaml_text.dump(run.model_dump())


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a run's file: for editors, and as the reference of every key."""
    schema = RunConfig.model_json_schema()
    training = training_model("causal_lm").model_json_schema()
    schema["$defs"] |= training.pop("$defs", {})
    for method in METHODS:
        fields = training_model("causal_lm", method).model_json_schema()
        schema["$defs"] |= fields.get("$defs", {})
        _add_fields(training["properties"], fields["properties"])
    schema["properties"]["training"] |= training
    sweep = SweepSection.model_json_schema()
    schema["$defs"] |= sweep.pop("$defs", {})
    schema["properties"]["sweep"] = sweep
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lsr-scale run"}


def _add_fields(fields: dict[str, Any], others: dict[str, Any]) -> None:
    """Add to a schema's fields those of another method; of a name that both have, either's values are taken."""
    for name, other in others.items():
        kinds = [
            {k: v for k, v in kind.items() if k not in ("default", "description")}
            for kind in (fields.get(name, other), other)
        ]
        if name not in fields:
            fields[name] = other
        elif kinds[0] != kinds[1]:
            told = {k: v for k, v in fields[name].items() if k in ("default", "description", "title")}
            fields[name] = {"anyOf": kinds, **told}


def training_arguments(run: RunConfig) -> dict[str, Any]:
    """Return keyword arguments for the trainer's class (`training_arguments_class`), without `deepspeed`."""
    return training_kwargs(run.training, run.model.task)


@functools.cache
def section_models(task: Task, method: str = "sft") -> dict[str, type[BaseModel]]:
    """Return the models whose fields are the valid names of each section, adapter methods as `adapter.<method>`."""
    return {
        "": RunConfig,
        "model": ModelSection,
        "data": DataSection,
        "training": training_model(task, method),
        "training.early_stopping": EarlyStopping,
        "deepspeed": DeepSpeedSection,
        "eval": EvalSection,
        "source": SourceSection,
        **{f"adapter.{method}": model for method, model in ADAPTER_SECTIONS.items()},
    }


def validate(data: dict[str, Any], where: str, places: yaml_text.Places, folder: Path) -> RunConfig:
    """Return the run of parsed sections.

    Args:
        data: The sections.
        where: The file or whatever they come from.
        places: Where each value stands.
        folder: What the paths of DeepSpeed's files are relative to.

    Raises:
        UserError: naming every problem.
    """
    try:
        raise_problems(list(out_of_bounds(data)))
        return RunConfig.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise UserError(explain(error, data, where, places, section_models)) from None
