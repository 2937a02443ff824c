"""The trials of a sweep as runs: each is checked as if it had a file of its own, and all as what shares one base."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lsr_scale.config import yaml_text
from lsr_scale.config.bounds import out_of_bounds
from lsr_scale.config.comparison import (
    comparison_notes,
    differ_in_rows,
    evaluates,
    keys_of_scale,
    metrics_of,
    score_metric,
    share_of_right,
)
from lsr_scale.config.deepspeed import beyond_a_trial
from lsr_scale.config.messages import explain, raise_problems
from lsr_scale.config.run import RunConfig, plain, read_sections, section_models, validate
from lsr_scale.config.sections import Section
from lsr_scale.config.shipped import find_run
from lsr_scale.config.sweep import Changes, Drawn, RandomSection, StopSection, SweepSection, changes_of
from lsr_scale.config.training import EVALUATED, Task, training_model
from lsr_scale.errors import UserError, did_you_mean, quoted

# Of training: trials that share a step are rows of one batch.
_OF_A_STEP = (
    *("max_length", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "loss_type"),
)
# All trials are trained on one base, which computes in one way.
_OF_THE_BASE = (
    *("fused", "compute", "keep_in_bf16", "compute_tolerance", "memory", "cuda_graphs", "gradient_checkpointing"),
    *("activation_checkpointing", "use_liger_kernel", "torch_compile", "ddp_timeout"),
)


@dataclasses.dataclass(frozen=True)
class TrialPlan:
    """One trial: its name, the values that it changes by their dotted keys, and the run that comes of them."""

    name: str
    changes: Changes
    run: RunConfig


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's section, its trials, and the run that they change: its sections as written, and resolved.

    `base` is None where the run is none without what the trials add, such as their data. `where` is the file or
    whatever they come from, and `places` has where each value stands.
    """

    section: SweepSection
    trials: list[TrialPlan]
    written: dict[str, Any]
    base: RunConfig | None
    where: str = "run"
    places: yaml_text.Places = dataclasses.field(default_factory=dict, repr=False)

    @property
    def output_dir(self) -> str | None:
        """Where the sweep's folder is to be, None for one of its own under runs/."""
        return self.trials[0].run.training["output_dir"]

    def scored_by(self) -> str:
        """Return what trials are compared by: `stop.metric`, else as `score_metric` chooses."""
        if self.section.stop is not None and self.section.stop.metric is not None:
            return self.section.stop.metric
        return score_metric(self.runs, stops=self.section.stop is not None)

    def stopped_by(self, metric: str) -> "Sweep":
        """Return the sweep with `stop` comparing a metric."""
        assert self.section.stop is not None
        stop = self.section.stop.model_copy(update={"metric": metric})
        return dataclasses.replace(self, section=self.section.model_copy(update={"stop": stop}))

    def notes(self) -> list[str]:
        """Return what a user should know before trials are compared, a line each."""
        return comparison_notes(self.runs, self.scored_by())

    def trial(self, name: str) -> TrialPlan:
        """Return the trial of a name.

        Raises:
            UserError: if there is none.
        """
        for trial in self.trials:
            if trial.name == name:
                return trial
        near = did_you_mean(name, [trial.name for trial in self.trials])
        raise UserError(f"{self.where}: no trial is called {name!r:.100}; {near}")

    def place_of(self, trial: TrialPlan, key: str) -> str:
        """Return where a trial's value of a dotted key of the run stands."""
        changed = next(
            (one for one in trial.changes if f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.")), ""
        )
        path = _place_in(self.section, changed, trial.changes[changed]) if changed else tuple(key.split("."))
        return yaml_text.place_of(path, self.places, self.where)

    @property
    def runs(self) -> list[RunConfig]:
        """The trials' runs."""
        return [trial.run for trial in self.trials]


def is_sweep(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> bool:
    """Tell whether a run's file, with the overrides, has a section sweep."""
    return "sweep" in read_sections(path, overrides)[0]


def read_sweep(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Sweep:
    """Return the sweep that a YAML file describes.

    Args:
        path: The file, or the name of one that comes with the package.
        overrides: As in `load_run`.

    Raises:
        UserError: naming every problem with its line, and the trial whose it is.
    """
    data, places = read_sections(path, overrides)
    file = find_run(path)
    return _sweep(data, str(file), places, file.parent)


def sweep_from_dict(data: Mapping[str, Any], where: str = "run") -> Sweep:
    """Return the sweep that a mapping describes, whose section is `sweep`."""
    return _sweep(copy.deepcopy(plain(data)), where, {}, Path())


def _sweep(data: dict[str, Any], where: str, places: yaml_text.Places, folder: Path) -> Sweep:
    if "sweep" not in data:
        validate(data, where, places, folder)  # where the section is misspelt this says so, by its line
        raise UserError(
            f"{where}: has no section sweep; add one, such as sweep: {{grid: {{training.learning_rate: [1e-3, 2e-3]}}}}"
            "; or train the one run that it describes with lsr-scale train"
        )
    section = _section(data, where, places)
    written = {name: value for name, value in data.items() if name != "sweep"}
    base = None
    with contextlib.suppress(UserError):
        base = validate(copy.deepcopy(written), where, places, folder)
    return Sweep(section, trials_of(written, section, where, places, folder), written, base, where, places)


def _section(data: dict[str, Any], where: str, places: yaml_text.Places) -> SweepSection:
    """Return the section, checked by itself."""
    only = {"sweep": {} if data["sweep"] is None else data["sweep"]}
    own: dict[str, Any] = {"sweep": SweepSection, "sweep.random": RandomSection, "sweep.stop": StopSection}
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        own |= {f"sweep.random.values.{key}": Drawn for key in only["sweep"]["random"]["values"]}

    def models(task: Task, method: str = "sft") -> dict[str, Any]:
        return {**section_models(task, method), **own}

    try:
        raise_problems(list(out_of_bounds(only)))
        return _Only.model_validate(only).sweep
    except ValidationError as error:
        raise UserError(explain(error, only, where, places, models)) from None


class _Only(Section):
    sweep: SweepSection


def trials_of(
    run: RunConfig | Mapping[str, Any],
    section: SweepSection,
    where: str = "run",
    places: yaml_text.Places | None = None,
    folder: Path | None = None,
) -> list[TrialPlan]:
    """Return the trials of a sweep, each with its run.

    Args:
        run: What they change: the sections as they were written, from which defaults follow anew, or a run.
        section: What they change of it.
        where: The file or whatever it comes from.
        places: Where each value stands.
        folder: What the paths of DeepSpeed's files are relative to.

    Raises:
        UserError: naming the trial and the key: for a value that the run would not take, for two trials that are
            equal, and where trials differ in what they must agree in.
    """
    written = run.model_dump() if isinstance(run, RunConfig) else run
    try:
        named = changes_of(section)
    except ValueError as error:
        raise UserError(f"{yaml_text.place_of(('sweep',), places or {}, where)}: sweep: {error}") from None
    alone = _mistake(dict(written), where, places or {}, folder or Path())
    trials = []
    for name, changes in named.items():
        data, known = copy.deepcopy(dict(written)), dict(places or {})
        try:
            for key, value in sorted(changes.items(), key=lambda item: item[0].count(".")):  # sections first
                place = yaml_text.place_of(_place_in(section, key, value), known, where)
                yaml_text.assign(data, known, key.split("."), copy.deepcopy(value), place, "path")
            trials.append(TrialPlan(name, changes, validate(data, where, known, folder or Path())))
        except UserError as error:
            if str(error) == alone:  # no trial's own
                raise
            advice = _of_method(changes, str(error)) or _of_sections(changes)
            raise UserError(f"trial {name}: {error}{advice}") from None
    _check_different(trials)
    _check_agree(trials, section, where, places or {})
    for trial in trials:
        _check_trial(trial, section, where, places or {})
    _check_stop(trials, section, where, places or {})
    return trials


def _of_sections(changes: Changes) -> str:
    """Return how a key of a section is written, where a trial has whole sections; nothing where it has none."""
    key = next(
        (f"{name}.{next(iter(value))}" for name, value in changes.items() if isinstance(value, dict) and value), None
    )
    return (
        f"; a section of a trial stands in place of the run's whole one: for a key of it write {key}: ..."
        if key
        else ""
    )


def _of_method(changes: Changes, error: str) -> str:
    """Return how a trial of another method is written, where it has the run's options of its own; else nothing."""
    method = changes.get("adapter.method")
    if not isinstance(method, str) or ": adapter." not in error:
        return ""
    return (
        "; the run's other options of adapter are its method's: change the section in place of the method alone, "
        f"adapter: {{method: {method}, rank: 8}}, in grid a list of such"
    )


def _mistake(data: dict[str, Any], where: str, places: yaml_text.Places, folder: Path) -> str | None:
    """Return what is wrong with the run that the trials change, None where nothing is; trials may set it right."""
    try:
        validate(copy.deepcopy(data), where, places, folder)
    except UserError as error:
        return str(error)
    return None


def _place_in(section: SweepSection, key: str, value: Any) -> yaml_text.KeyPath:
    """Return the path of what sets a dotted key to a value."""
    if key in section.grid:
        return "sweep", "grid", key
    if section.random is not None and key in section.random.values:
        return "sweep", "random", "values", key
    entry = next((index for index, entry in enumerate(section.list) if entry.get(key) == value), 0)
    return "sweep", "list", entry, key


def _check_different(trials: list[TrialPlan]) -> None:
    """Refuse trials whose runs are equal, such as where one names a default."""
    seen: list[tuple[dict[str, Any], str]] = []
    for trial in trials:
        dumped = trial.run.model_dump()
        if (same := next((name for other, name in seen if other == dumped), None)) is not None:
            raise UserError(f"sweep: the trials {same} and {trial.name} are one run; remove one of them")
        seen.append((dumped, trial.name))


def _check_agree(trials: list[TrialPlan], section: SweepSection, where: str, places: yaml_text.Places) -> None:
    """Refuse trials that differ in what they must agree in."""
    first = trials[0]
    of_the_base = [*_OF_THE_BASE, *(["seed"] if first.run.model.random_weights else [])]
    shares = section.together != 1 and any(_may_share(trial.run) for trial in trials)
    for trial in trials[1:]:
        names = [*_OF_A_STEP, *of_the_base] if shares else of_the_base
        for name in [*_own_of_methods(first, trial, [*_OF_A_STEP, *of_the_base]), *names]:
            one, other = (run.training.get(name) for run in (first.run, trial.run))
            if one != other:
                key = f"training.{name}"
                place = yaml_text.place_of(_place_in(section, key, other), places, where)
                why = "they share steps of one base" if name in _OF_A_STEP else "they are trained on one base"
                why = _WHY_AGREE.get(name, why)
                raise UserError(
                    f"{place}: sweep: {key} has to be the same in all trials, as {why}: it is {quoted(one)} in "
                    f"{first.name} and {quoted(other)} in {trial.name}; make a sweep of its own for each, with --set "
                    f"{key}=...{', or set sweep.together: 1' if name in _OF_A_STEP else ''}"
                )


def _may_share(run: RunConfig) -> bool:
    """Tell whether a run is of the kind that can share steps, as far as its method tells (`training.steps.sharing`)."""
    return run.model.task == "causal_lm" and run.training["method"] == "sft"


_WHY_AGREE = {
    "seed": "the base's weights are drawn by it",
    "method": "these two take rows in other forms, with other options",
}


def _own_of_methods(first: TrialPlan, trial: TrialPlan, names: list[str]) -> list[str]:
    """Return ["method"] where trials differ by their methods in what only one of these has, else nothing."""
    methods = [run.training["method"] for run in (first.run, trial.run)]
    if methods[0] == methods[1]:
        return []
    models = [training_model(first.run.model.task, method).model_fields for method in methods]
    differ = [name for name in names if first.run.training.get(name) != trial.run.training.get(name)]
    return ["method"] if any(not all(name in fields for fields in models) for name in differ) else []


def _check_trial(trial: TrialPlan, section: SweepSection, where: str, places: yaml_text.Places) -> None:
    """Refuse a trial that no single process can train, or that stop cannot compare."""
    if what := beyond_a_trial(trial.run.deepspeed.config or {}):
        raise UserError(
            f"deepspeed.config: {what}, and a trial of a sweep is trained on one GPU by itself; set deepspeed.config: "
            "zero0 or null"
        )
    if section.stop is None:
        return
    metric, known = section.stop.metric, metrics_of(trial.run)
    if metric is not None and metric not in known:
        near = did_you_mean(metric, known) if metric not in EVALUATED else f"this run's are {', '.join(known)}"
        place = yaml_text.place_of(("sweep", "stop", "metric"), places, where)
        raise UserError(f"{place}: sweep.stop.metric: {metric!r}: {near}")
    if not evaluates(trial.run):
        lacks, remedy = "no rows for them", "data.validation or data.validation_split: 0.05"
        if trial.run.data.has_validation:
            lacks, remedy = "none (training.eval_strategy: no)", "training.eval_strategy: steps"
        place = yaml_text.place_of(("sweep", "stop"), places, where)
        raise UserError(
            f"{place}: trial {trial.name}: sweep.stop compares evaluations, and the run has {lacks}; add {remedy}"
        )


def _check_stop(trials: list[TrialPlan], section: SweepSection, where: str, places: yaml_text.Places) -> None:
    """Refuse to stop the worst of trials whose evaluations are not comparable."""
    if section.stop is None:
        return
    runs = [trial.run for trial in trials]
    place = f"{yaml_text.place_of(('sweep', 'stop'), places, where)}: sweep.stop"
    remove = "remove it (training.early_stopping: {patience: 3} ends each trial by its own evaluations)"
    if differ_in_rows(runs, "eval_"):
        first = trials[0]
        other = next(trial for trial in trials if differ_in_rows([first.run, trial.run], "eval_"))
        raise UserError(
            f"{place}: trials are evaluated on different rows (those of {first.name} and of {other.name}), so it would "
            f"stop those whose rows are harder; {remove}, or give all the same data.validation"
        )
    metric = section.stop.metric or score_metric(runs, stops=True)
    if keys := keys_of_scale(runs, metric):
        share = share_of_right(runs)
        other = f"set sweep.stop.metric: {share}" if share else "make a sweep of its own for each value"
        raise UserError(
            f"{place}: trials differ in {', '.join(keys)}, so their {metric} is not defined alike and does not tell "
            f"which are the worst; {other}, or {remove}"
        )
