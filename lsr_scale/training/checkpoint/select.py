"""Which checkpoint a run resumes from, and whether this run, its data and these processes fit it."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lsr_scale import config
from lsr_scale.config import RunConfig
from lsr_scale.config.training import STEERED_SCHEDULES
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.checkpoint.manifest import State, damage, read_state
from lsr_scale.units import amount

_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

# What must not change when a run resumes, or would have no effect, since the optimizer's state holds it as well.
# Anything else may change, and is noted.
_FIXED = re.compile(
    r"adapter\..*|data\.validation_split|model\.(task|num_labels|labels|quantization|double_quantization|dtype)"
    r"|training\.(optim|optim_args|optim_target_modules|learning_rate|weight_decay|adam_beta1|adam_beta2|adam_epsilon)"
)


def run_folder_of(checkpoint: Path) -> RunFolder:
    """Return the folder of a checkpoint's run; it may be a link among the run's checkpoints, or one to such."""
    beside = RunFolder(checkpoint.absolute().parent.resolve())
    return beside if beside.is_run() else RunFolder(checkpoint.resolve().parent)


def newest(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, and a line about each newer one that is damaged."""
    notes = []
    for checkpoint in reversed(folder.checkpoints()):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, notes
        notes.append(f"{checkpoint} is skipped: {problem}")
    return None, notes


def fit(checkpoint: Path, run: RunConfig, num_processes: int) -> tuple[RunConfig, list[str]]:
    """Return the run that resumes from a checkpoint, and what changed since it was saved, one line each.

    The position in the data is a number of steps, so a step must have as many rows as before: the gradient accumulation
    is that of this many processes. The one given may be meant for as many as the run began with, or as saved the
    checkpoint.

    Args:
        checkpoint: The checkpoint, in a run's folder.
        run: The run as it is given now.
        num_processes: How many processes train now.

    Raises:
        UserError: if the checkpoint is damaged, was saved with other rows a step, or by a run of another model or
            adapter.
    """
    if (problem := damage(checkpoint)) is not None:
        raise UserError(f"--resume {checkpoint}: not a checkpoint to resume from: {problem}")
    state = read_state(checkpoint)
    run = _as_decided(checkpoint, run)
    meant_for = (state.first_num_processes, state.num_processes)
    if state.rows_per_step in [run.training[_BATCH] * run.training[_ACCUMULATION] * number for number in meant_for]:
        run = _with_accumulation(run, state.rows_per_step, num_processes)
    _check_rows_per_step(checkpoint, state, run, num_processes)
    notes = _changes_since(checkpoint, run)
    if (before := state.num_processes) != num_processes:
        notes.insert(0, f"{amount(before, 'process')} saved the checkpoint, {num_processes} resume from it")
    return run, notes


def _as_decided(checkpoint: Path, run: RunConfig) -> RunConfig:
    """Return a run with what was decided when it began, and it does not say: its dtype, a classifier's labels."""
    saved = run_folder_of(checkpoint).config
    if not saved.is_file():
        return run
    model, earlier = run.model, config.load_run(saved).model
    found: dict[str, Any] = {"dtype": earlier.dtype} if model.dtype == "auto" else {}
    unnamed = model.task == "seq_cls" and model.labels is None
    if unnamed and earlier.num_labels is not None and model.num_labels in (None, earlier.num_labels):
        found |= {"labels": earlier.labels, "num_labels": earlier.num_labels}
    return run.with_model(**found)


def as_begun(checkpoint: Path, run: RunConfig) -> RunConfig:
    """Return a run that `fit` returned with the accumulation of the processes that it began with, for its config.yaml.

    So that file can be resumed with on any number of processes, also before this part of the run saves a checkpoint.
    """
    state = read_state(checkpoint)
    return _with_accumulation(run, state.rows_per_step, state.first_num_processes)


def _with_accumulation(run: RunConfig, rows_per_step: int, num_processes: int) -> RunConfig:
    """Return the run with the accumulation by which so many processes have so many rows a step, if there is one."""
    accumulation, remainder = divmod(rows_per_step, run.training[_BATCH] * num_processes)
    return run if remainder else run.model_copy(update={"training": {**run.training, _ACCUMULATION: accumulation}})


def _check_rows_per_step(checkpoint: Path, state: State, run: RunConfig, num_processes: int) -> None:
    """Refuse a run whose steps have other rows than the checkpoint's had."""
    before, rows, batch = state.num_processes, state.rows_per_step, run.training[_BATCH]
    rows_now = batch * run.training[_ACCUMULATION] * num_processes
    if rows_now != rows:
        accumulation, remainder = divmod(rows, batch * num_processes)
        if rows % num_processes:
            remedy = f"resume with {amount(before, 'process')}, or another number of them that divides {rows}"
        elif remainder:
            remedy = (
                f"set training.{_BATCH} and training.{_ACCUMULATION} whose product is {rows // num_processes}, or "
                f"resume with {amount(before, 'process')}"
            )
        else:
            remedy = f"set training.{_ACCUMULATION}={accumulation}"
        raise UserError(
            f"--resume {checkpoint}: its steps had {amount(rows, 'row')} ({amount(before, 'process')}), these would "
            f"have {rows_now}, so the position in the data would be lost; {remedy}"
        )
    if before != num_processes and run.training.get("train_sampling_strategy") == "batch_rebalance":
        raise UserError(
            f"--resume {checkpoint}: training.train_sampling_strategy: batch_rebalance orders the rows by the number "
            f"of processes, so the position in the data would be lost; resume with {amount(before, 'process')}"
        )


def _changes_since(checkpoint: Path, run: RunConfig) -> list[str]:
    """Return what differs from the run that saved a checkpoint, one line each; refuse what must not."""
    saved = run_folder_of(checkpoint).config
    if not saved.is_file():
        return [f"there is no config.yaml beside {checkpoint.name} to compare the run with"]
    earlier = config.load_run(saved)
    # those that are no function of the step alone: their state, settings among it, is the checkpoint's
    steered = any(one.training["lr_scheduler_type"] in STEERED_SCHEDULES for one in (earlier, run))
    changed = list(changes(earlier.model_dump(), run.model_dump()))
    fixed = [
        text
        for path, text in changed
        if _FIXED.fullmatch(path) or (path.startswith("training.lr_scheduler_") and steered)
    ]
    if fixed:
        raise UserError(
            f"--resume {checkpoint}: saved by a run with another {'; '.join(fixed)}; resume with its own "
            f"configuration: --config {shlex.quote(str(saved))}"
        )
    return [f"changed since the run began: {text}" for path, text in changed if not path.endswith("_dir")]


def check_data(checkpoint: Path, sources: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return what a user should know of the data since a run began, one line each.

    Args:
        checkpoint: The checkpoint that is resumed from, in the run's folder.
        sources: Where the rows come from now, by part, as in the run's `data.json`.

    Raises:
        UserError: if the training rows are others, so that the position in them would mean nothing.
    """
    file = run_folder_of(checkpoint).data
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before = {part: [_identity(source) for source in saved[part]] for part in ("train", "validation")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"no {file} says what data {checkpoint.name} was trained on, so it could not be compared"]
    now = {part: [_identity(source) for source in sources[part]] for part in before}
    changed = {
        part: [
            f"{part}: {_described(old)} when the run began, {_described(new)} now"
            for old, new in zip_longest(before[part], now[part])
            if old is None or new is None or old[1:] != new[1:]
        ]
        for part in before
    }
    if changed["train"]:
        raise UserError(
            f"--resume {checkpoint}: the training data changed, so the position in it would be lost; put it back as it "
            f"was, or train on it from these factors, without --resume: --set "
            f"{shlex.quote(f'adapter.start_from={checkpoint}')} --set training.output_dir=FOLDER\n"
            + "\n".join(changed["train"][:8])
        )
    return [f"data changed since the run began: {line}" for line in changed["validation"]]


def _identity(source: dict[str, Any]) -> tuple[str, str, int]:
    """Return a source's name, the hash of its content, and its number of rows."""
    return source["resolved"], str(source["sha256"] or source["fingerprint"]), source["num_rows"]


def _described(source: tuple[str, str, int] | None) -> str:
    return "nothing" if source is None else f"{source[0]} with {amount(source[2], 'row')} (hash {source[1][:12]})"


def changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, "path: before -> after") for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from changes(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, f"{path}: {before!r:.60} -> {after!r:.60}"
