"""A run's file as short as it can be: what differs from the defaults, and what the run derives from that."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from lsr_scale.config import yaml_text
from lsr_scale.config.deepspeed import SHIPPED
from lsr_scale.config.run import RunConfig
from lsr_scale.config.sections import ADAPTER_SECTIONS, DataSection, EvalSection, ModelSection, SourceSection
from lsr_scale.config.training import defaults_of, training_model

Key = tuple[str, str]  # section and name
Trials = Sequence[tuple[Mapping[str, Any], RunConfig]]  # what each changes by dotted keys, and the run that comes of it

# what a file always says, whatever its value
_ALWAYS = {("model", "name"), ("adapter", "method"), ("data", "train")}


@dataclasses.dataclass(frozen=True)
class Difference:
    """What of a resolved run is not the default: `values` by section and name; `derived` are not in its file."""

    values: dict[str, dict[str, Any]]
    derived: set[Key]

    def to_yaml(self) -> str:
        """Return it as a run's file, which resolves to the same run; what is derived is marked by a comment."""
        lines, section = [], ""
        for line in yaml_text.dump(self.values, short=True).splitlines():
            name = line.strip().partition(":")[0]
            if not line.startswith(" "):
                section = name
            elif line.startswith("  ") and line[2] != " " and (section, name) in self.derived:
                line += "  # derived"
            lines.append(line)
        return "\n".join(lines) + "\n"


def difference(run: RunConfig, written: Mapping[str, Any], trials: Trials = ()) -> Difference:
    """Return what of a run differs from the defaults; of a sweep's run all that its trials are to find there.

    Args:
        run: The run, resolved.
        written: Its file's sections as they stand there, with what the command line set.
        trials: Of a sweep, its trials. What is written is kept then, as another method's default may be another; what
            is derived is left out where a trial derives something else.
    """
    resolved, defaults = run.model_dump(), _defaults(run)
    values: dict[str, dict[str, Any]] = {}
    derived: set[Key] = set()
    not_theirs = derived_otherwise(run, written, trials)
    for section, fields in resolved.items():
        in_file = written.get(section) or {}
        for name, value in fields.items():
            key, is_default = (section, name), value == defaults[section].get(name, PydanticUndefined)
            if is_default and key not in _ALWAYS and not (trials and name in in_file):
                continue
            if key in not_theirs:
                continue
            values.setdefault(section, {})[name] = _short(section, name, value)
            if name not in in_file and not isinstance(value, list | dict):
                derived.add((section, name))
    return Difference(values, derived)


def derived_otherwise(run: RunConfig, written: Mapping[str, Any], trials: Trials) -> set[Key]:
    """Return the keys that stand in no file and that a sweep's trials have other values of, or do not have."""
    unwritten = [
        (section, name, value)
        for section, fields in run.model_dump().items()
        for name, value in fields.items()
        if name not in (written.get(section) or {})
    ]
    found: set[Key] = set()
    for changes, trial in trials:
        theirs = trial.model_dump()
        for section, name, value in unwritten:
            same = name in theirs[section] and theirs[section][name] == value
            if not same and not changes.keys() & {section, f"{section}.{name}"}:
                found.add((section, name))
    return found


def _defaults(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Return what a run of this task and method has where its file says nothing."""
    task, method = run.model.task, run.adapter.method
    fields = training_model(task, run.training["method"]).model_fields
    of_training = {name: field.default for name, field in fields.items()} | defaults_of(task, run.training["method"])
    of_training["method"] = "sft"
    return {
        "model": _of_fields(ModelSection),
        "adapter": ADAPTER_SECTIONS[method].model_validate({"method": method}).model_dump(),
        "data": _of_fields(DataSection),
        "training": of_training | {"eval_strategy": "epoch" if run.data.has_validation else "no"},
        "deepspeed": {"config": SHIPPED["zero2"]},
        "eval": _of_fields(EvalSection),
    }


def _of_fields(model: Any) -> dict[str, Any]:
    return {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}


def _short(section: str, name: str, value: Any) -> Any:
    """Return a value as people write it: a shipped DeepSpeed configuration by its name, a source by its path alone."""
    if section == "deepspeed":
        return next((shipped for shipped, content in SHIPPED.items() if content == value), value)
    if isinstance(value, list):
        return [_short_source(item) if isinstance(item, dict) and "path" in item else item for item in value]
    return value


def _short_source(source: dict[str, Any]) -> str | dict[str, Any]:
    defaults = _of_fields(SourceSection)
    kept = {name: value for name, value in source.items() if value != defaults[name]}
    return kept["path"] if set(kept) == {"path"} else kept
