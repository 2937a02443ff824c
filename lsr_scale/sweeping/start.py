"""How a sweep starts: which folder it writes to, and whether it goes on with what lies there."""

import contextlib
import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from lsr_scale.config.comparison import keys_of_scale, metric_words, metrics_of
from lsr_scale.config.trials import Sweep
from lsr_scale.data.source_check import missing_of
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.run.folder import RunFolder
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState
from lsr_scale.sweeping.scores import results_of, score_of
from lsr_scale.training.checkpoint.select import changes
from lsr_scale.units import amount

_SHOWN = 8  # sources that are not there; the rest is counted


def begin(sweep: Sweep, name: str, resume: str | None, overwrite: bool) -> tuple[SweepFolder, list[str]]:
    """Return the sweep's folder, its state written, and what a user should know of the choice, a line each.

    Args:
        sweep: The sweep.
        name: Stem of the configuration file: without `training.output_dir` the folder is `runs/NAME-sweep`.
        resume: "auto" to go on with the sweep that lies there.
        overwrite: Start again in a folder that holds a sweep.

    Raises:
        UserError: if the folder is taken, or holds a sweep of other trials, or a trial's rows are not there.
    """
    if resume and overwrite:
        raise UserError("--resume resumes a sweep, --overwrite starts it again: give one of them")
    if resume not in (None, "auto"):
        raise UserError(f"--resume {resume}: a sweep resumes each trial from its newest checkpoint; give --resume auto")
    folder = SweepFolder(_find(sweep.output_dir, name, bool(resume) or overwrite))
    RunFolder(folder.path).make()
    try:
        with folder.locked():
            _check_free(folder, bool(resume) or overwrite)
            if resume and folder.is_sweep():
                state, notes = _continued(folder, sweep)
            else:
                state, notes = _anew(folder, sweep)
            _check_sources(sweep, state)
            folder.write(state)
    except UserError:
        if not folder.is_sweep():
            (folder.path / ".sweep.lock").unlink(missing_ok=True)
            RunFolder(folder.path).release()
        raise
    return folder, notes


def _check_sources(sweep: Sweep, state: SweepState) -> None:
    """Refuse a sweep in which what a trial is to read is not there: it would be known once its turn comes.

    Raises:
        UserError: naming trials, keys and where they stand.
    """
    missing = missing_of([trial for trial in sweep.trials if not state.trials[trial.name].has_ended], sweep)
    if missing:
        more = [f"... and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        raise UserError("\n".join([*missing[:_SHOWN], *more]))


def _find(output_dir: str | None, name: str, again: bool) -> Path:
    """Return where the sweep goes: what is named, else the first free `runs/NAME-sweep`, or the newest sweep there."""
    if output_dir is not None:
        return user_path(output_dir, "training.output_dir")
    stem = f"{name.lstrip('.') or 'run'}-sweep"
    taken: list[Path] = []
    for number in count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not os.path.lexists(path):
            sweeps = [one for one in taken if SweepFolder(one).is_sweep()]
            return sweeps[-1] if again and sweeps else path
        taken.append(path)
    raise AssertionError


def _check_free(folder: SweepFolder, again: bool) -> None:
    """Refuse a folder that holds a sweep, unless that is resumed or overwritten, or what no sweep wrote."""
    if folder.is_sweep():
        folder.read()
        if not again:
            raise UserError(
                f"{folder.path}: holds a sweep already; --resume auto continues it, --overwrite starts it again, "
                "--set training.output_dir=... goes elsewhere"
            )
        return
    if RunFolder(folder.path).is_marked():
        raise UserError(
            f"{folder.path}: holds a run, and a sweep has a folder of its own; go elsewhere with --set "
            "training.output_dir=..."
        )
    own = (folder.state, folder.table, folder.losses, folder.rewards, folder.scores, folder.path / "trials")
    if others := [path.name for path in own if os.path.lexists(path)]:
        raise UserError(
            f"{folder.path}: holds {', '.join(others)}, which no sweep wrote and this one would write over; move them "
            "away, or go elsewhere with --set training.output_dir=..."
        )


def _anew(folder: SweepFolder, sweep: Sweep) -> tuple[SweepState, list[str]]:
    """Return the state of a sweep that begins, over an earlier one if there is one."""
    state, notes = SweepState.new(sweep), []
    if folder.is_sweep():
        if folder.alive():
            raise UserError(f"{folder.path}: a sweep is under way here; wait for its end, or go elsewhere")
        for trial in state.trials.values():
            trial.overwrite = folder.trial(trial.name).is_marked()
        if left := [name for name in folder.read().trials if name not in state.trials]:
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            notes.append(f"left in trials/, of the earlier sweep: {shown}")
    return state, notes


def _continued(folder: SweepFolder, sweep: Sweep) -> tuple[SweepState, list[str]]:
    """Return the state of a sweep that goes on; trials may have been added to it.

    Raises:
        UserError: if its trials, or the run that they change, are others.
    """
    state = folder.read()
    sweep = _stopped_as_before(sweep, state, folder)
    now = SweepState.new(sweep)
    different = [text for _, text in changes(_without_folder(state.run), _without_folder(now.run))]
    before = {name: value for name, value in state.sweep.items() if name not in ("together", "list")}
    after = {name: value for name, value in now.sweep.items() if name not in ("together", "list")}
    different += [text for _, text in changes(before, after, "sweep")]
    old, new = (one.sweep["list"] for one in (state, now))
    if new[: len(old)] != old or (old == [] and new != []):
        gone = [
            text for number, entry in enumerate(old) for _, text in changes(entry, _at(new, number), f"list.{number}")
        ]
        different += gone or ["sweep.list: trials were added to a sweep without a list"]
    if different:
        raise UserError(
            f"{folder.path}: its sweep was another one, so its trials would not go together: "
            f"{'; '.join(different[:6])}{'; ...' if len(different) > 6 else ''}; put that back (trials may be added at "
            "the end of sweep.list), or start anew with --overwrite or --set training.output_dir=..."
        )
    added = [name for name in now.trials if name not in state.trials]
    trials = {name: state.trials.get(name, trial) for name, trial in now.trials.items()}
    notes = [f"added to the sweep: {amount(len(added), 'trial')}"] if added else []
    if now.scored_by != state.scored_by:
        trials = {name: _scored(trial, folder.trial(name), now.scored_by) for name, trial in trials.items()}
        notes.append(
            f"trials are compared by {metric_words(now.scored_by)} now, no longer by {metric_words(state.scored_by)}: "
            "those that ended have that of their results"
        )
        if without := [trial.name for trial in trials.values() if trial.status == "finished" and trial.score is None]:
            notes.append(f"their results have no {metric_words(now.scored_by)}: {', '.join(without)}")
    return SweepState(now.run, now.sweep, now.scored_by, trials, state.dtype, now.notes), notes


def _stopped_as_before(sweep: Sweep, state: SweepState, folder: SweepFolder) -> Sweep:
    """Return a sweep whose `stop`, where it names no metric, compares at the next rung what it did at those before.

    Raises:
        UserError: if trials were added that cannot be compared by that.
    """
    metric = (state.sweep.get("stop") or {}).get("metric")
    if metric is None or sweep.section.stop is None or sweep.section.stop.metric is not None:
        return sweep
    before = [trial.run for trial in sweep.trials if trial.name in state.trials]
    lacking = [trial.name for trial in sweep.trials if metric not in metrics_of(trial.run)]
    keys = [] if keys_of_scale(before, metric) else keys_of_scale(sweep.runs, metric)
    if lacking or keys:
        why = f"{lacking[0]} has none" if lacking else f"they differ in {', '.join(keys)} now, by which it is defined"
        raise UserError(
            f"{folder.path}: its trials are compared by {metric} since it began, and {why}; leave out what was added "
            "and make a sweep of its own of that, or start anew with --overwrite or --set training.output_dir=..."
        )
    return sweep.stopped_by(metric)


def _scored(trial: TrialState, folder: RunFolder, metric: str) -> TrialState:
    """Return a trial with its score by another metric: of its folder's results, else of those that were kept of them.

    One that has not finished has none: without `stop`, whose metric stays, only what finished has a score.
    """
    results = trial.results
    if trial.status == "finished":
        with contextlib.suppress(UserError):
            results = {**results, **results_of(folder, metric)}
    return replace(trial, results=results, score=score_of(results, metric) if trial.status == "finished" else None)


def _at(items: list[Any], number: int) -> Any:
    return items[number] if number < len(items) else None


def _without_folder(run: dict[str, Any]) -> dict[str, Any]:
    training = {name: value for name, value in (run.get("training") or {}).items() if name != "output_dir"}
    return {**run, "training": training}
