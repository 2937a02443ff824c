"""Going on from a checkpoint: which one, whether it is whole, and whether this run and these processes fit it."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerState

from lsr_scale import config, files
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.run.folder import ADAPTER_FILES, MANIFEST, STATE, TENSORS, RunFolder, is_own_checkpoint, step_of

TRAINER_STATE = "trainer_state.json"
_NEEDED = (STATE, TENSORS, TRAINER_STATE, *ADAPTER_FILES)
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

# What must not change between a checkpoint and its continuation, or would not be heeded, for the optimizer's state has
# it too. Anything else may change, and is said.
_FIXED = re.compile(
    r"adapter\..*|model\.(task|num_labels|quantization|double_quantization|dtype)"
    r"|training\.(optim|optim_args|optim_target_modules|learning_rate|weight_decay|adam_beta1|adam_beta2|adam_epsilon)"
)
# Schedules that are no function of the step alone: what they keep, settings among it, is the checkpoint's.
_KEEP_THEIR_SETTINGS = ("reduce_lr_on_plateau", "greedy")


class State(BaseModel):
    """`training_state.json`: what resuming needs besides tensors."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0)
    num_processes: int = Field(ge=1)
    first_num_processes: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    optimizer: str
    scalars: dict[str, Any]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    random: list[dict[str, Any]]


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file in a folder, and see all of it onto the disk."""
    files.share(folder)
    members = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in members}
    for file in members:
        files.sync(file)
    files.write_json(folder / MANIFEST, {"files": listed})
    files.sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is.

    Its files are compared with its manifest, and its name with the step that its state is of.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"there is no {MANIFEST} in it"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in listed.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} lists {name!r:.80}, which is outside of it"
            file = checkpoint / name
            if not file.is_file():
                return f"there is no {name} in it, which {MANIFEST} lists"
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} is cut short or altered: {size} bytes, {expected['bytes']} in {MANIFEST}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is altered: its SHA-256 is not that in {MANIFEST}"
        lacking = [name for name in _NEEDED if name not in listed]
        if lacking:
            return f"{MANIFEST} does not list {lacking[0]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({str(error)[:200]})"
    return _wrong_state(checkpoint)


def _wrong_state(checkpoint: Path) -> str | None:
    """Return what is wrong with what the files of a checkpoint say, None if nothing is."""
    try:
        step = _state(checkpoint).step
    except ValidationError as error:
        first = error.errors()[0]
        return f"{STATE}: {'.'.join(map(str, first['loc']))[:80] or 'content'}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE} cannot be read ({str(error)[:200]})"
    try:
        content = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        reached = TrainerState(**content).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{TRAINER_STATE} cannot be read ({str(error)[:200]})"
    if type(reached) is not int or reached != step:
        return f"{TRAINER_STATE} is of step {reached!r:.40}, {STATE} of step {step}"
    named = re.fullmatch("checkpoint-([0-9]{1,18})", checkpoint.name)
    if named and int(named[1]) != step:
        return f"it was saved after step {step}, which its name should say; name it checkpoint-{step} to go on from it"
    return None


def is_misnamed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is called by another step than it was saved after: somebody renamed or copied it."""
    try:
        return int(checkpoint.name.rpartition("-")[2]) != _state(checkpoint).step
    except (OSError, ValueError, RecursionError):
        return False


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint's files; what else somebody put there stays."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    names = {MANIFEST, *_NEEDED}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        names |= set(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    for name in names:
        if Path(name).name == name:  # nothing outside of it
            files.remove(checkpoint / name)
    with contextlib.suppress(OSError):
        checkpoint.rmdir()


def rotate(folder: RunFolder, limit: int | None, keep: Collection[int]) -> None:
    """Remove the oldest checkpoints beyond a limit, by the steps that they are of.

    Args:
        folder: The run's.
        limit: `training.save_total_limit`; None removes nothing.
        keep: Steps that stay, such as the best and the last: as many stay at least.
    """
    if limit is None or limit < 1:
        return
    saved = [path for path in folder.own_checkpoints() if not is_misnamed(path)]
    for path in [path for path in saved if step_of(path) not in keep][: max(0, len(saved) - limit)]:
        remove(path)


def free_place(checkpoint: Path) -> Path | None:
    """Move away what lies in a checkpoint's place and is none of that step; return where to, None if nothing did."""
    if not os.path.lexists(checkpoint) or (is_own_checkpoint(checkpoint) and not is_misnamed(checkpoint)):
        return None
    names = (f"{checkpoint.name}.kept", *(f"{checkpoint.name}.kept-{number}" for number in range(2, 1000)))
    target = next(path for name in names if not os.path.lexists(path := checkpoint.with_name(name)))
    return checkpoint.rename(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def home(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run; it may be a link among the run's checkpoints, or one to such."""
    beside = checkpoint.absolute().parent.resolve()
    return beside if RunFolder(beside).is_run() else checkpoint.resolve().parent


def step(checkpoint: Path) -> int:
    """Return the training step after which a whole checkpoint was saved, whatever its folder is called."""
    return _state(checkpoint).step


def _state(checkpoint: Path) -> State:
    return State.model_validate_json((checkpoint / STATE).read_bytes())


def fit(checkpoint: Path, run: RunConfig, num_processes: int) -> RunConfig:
    """Return the run with its accumulation such that a step has as many rows as before, on these many processes.

    The position in the data is a number of steps, so a step must have the rows that it had; `check` refuses the rest.
    The accumulation given may be meant for as many processes as the run began with, or as saved the checkpoint.
    """
    if damage(checkpoint) is not None:
        return run
    state = _state(checkpoint)
    rows, batch, accumulation = state.rows_per_step, *(run.training[name] for name in (_BATCH, _ACCUMULATION))
    meant_for = (state.first_num_processes, state.num_processes)
    if rows not in [batch * accumulation * number for number in meant_for]:
        return run  # another batch size or accumulation was asked for, which `check` judges
    return _accumulating(run, rows, num_processes)


def as_begun(checkpoint: Path, run: RunConfig) -> RunConfig:
    """Return the run that `fit` made with the accumulation of the processes that it began with, for its config.yaml.

    So that file can be gone on with on any number of processes, also before this part of the run saves a checkpoint.
    """
    state = _state(checkpoint)
    return _accumulating(run, state.rows_per_step, state.first_num_processes)


def _accumulating(run: RunConfig, rows: int, num_processes: int) -> RunConfig:
    """Return the run with the accumulation by which so many processes have so many rows a step, if there is one."""
    accumulation, lacking = divmod(rows, run.training[_BATCH] * num_processes)
    return run if lacking else run.model_copy(update={"training": {**run.training, _ACCUMULATION: accumulation}})


def newest(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, and a line about each newer one that is not whole."""
    notes = []
    for checkpoint in reversed(folder.checkpoints()):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, notes
        notes.append(f"{checkpoint} is left out: {problem}")
    return None, notes


def check(checkpoint: Path, run: RunConfig, num_processes: int) -> list[str]:
    """Return what changed since a checkpoint was saved, one line each.

    Args:
        checkpoint: The checkpoint, in a run's folder.
        run: The run that shall go on from it, as `fit` returned it.
        num_processes: How many processes train now.

    Raises:
        UserError: if the checkpoint is damaged, was saved with other rows a step, or by a run of another model or
            adapter.
    """
    problem = damage(checkpoint)
    if problem is not None:
        raise UserError(f"--resume {checkpoint}: not a checkpoint to go on from: {problem}")
    state = _state(checkpoint)
    before, rows = state.num_processes, state.rows_per_step
    batch = run.training[_BATCH]
    now = batch * run.training[_ACCUMULATION] * num_processes
    if now != rows:
        whole = rows % (batch * num_processes) == 0
        remedy = (
            f"training.{_ACCUMULATION}={rows // (batch * num_processes)}"
            if whole
            else f"training.{_BATCH} and training.{_ACCUMULATION} whose product is "
            f"{rows / num_processes:g}, or {before} process(es)"
        )
        raise UserError(
            f"--resume {checkpoint}: its steps had {rows} rows ({before} process(es)), these would have {now}, so the "
            f"position in the data would be lost; set {remedy}"
        )
    if before != num_processes and run.training.get("train_sampling_strategy") == "batch_rebalance":
        raise UserError(
            f"--resume {checkpoint}: training.train_sampling_strategy: batch_rebalance orders the rows by the number "
            f"of processes, so the position in the data would be lost; go on with {before} process(es)"
        )
    notes = [] if before == num_processes else [f"{before} process(es) saved the checkpoint, {num_processes} go on"]
    saved = RunFolder(home(checkpoint))
    if not saved.config.is_file():
        return [*notes, f"there is no config.yaml beside {checkpoint.name} to compare the run with"]
    earlier = config.load_run(saved.config)
    kinds = {str(one.training["lr_scheduler_type"]) for one in (earlier, run)}
    changed = list(changes(earlier.model_dump(), run.model_dump()))
    fixed = [
        text
        for path, text in changed
        if _FIXED.fullmatch(path)
        or (path.startswith("training.lr_scheduler_") and not kinds.isdisjoint(_KEEP_THEIR_SETTINGS))
    ]
    if fixed:
        raise UserError(
            f"--resume {checkpoint}: saved by a run with another {'; '.join(fixed)}; go on with its own configuration: "
            f"--config {saved.config}"
        )
    return [*notes, *(f"changed since the run began: {text}" for path, text in changed if not path.endswith("_dir"))]


def check_data(checkpoint: Path, sources: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return what a user should know of the data since a run began, one line each.

    Args:
        checkpoint: The checkpoint to go on from, in the run's folder.
        sources: Where the rows come from now, by part, as in the run's `data.json`.

    Raises:
        UserError: if the training rows are others, so that the position in them would mean nothing.
    """
    file = RunFolder(home(checkpoint)).data
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before = {part: [_row_of(source) for source in saved[part]] for part in ("train", "validation")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"no {file} says what data {checkpoint.name} was trained on, so it could not be compared"]
    now = {part: [_row_of(source) for source in sources[part]] for part in before}
    changed = {
        part: [
            f"{part}: {_in_words(old)} when the run began, {_in_words(new)} now"
            for old, new in zip_longest(before[part], now[part])
            if old is None or new is None or old[1:] != new[1:]
        ]
        for part in before
    }
    if changed["train"]:
        raise UserError(
            f"--resume {checkpoint}: the training data changed, so the position in it would be lost; put it back as it "
            f"was, or train on it from these factors, without --resume: --set adapter.start_from={checkpoint} --set "
            "training.output_dir=FOLDER\n" + "\n".join(changed["train"][:8])
        )
    return [f"data changed since the run began: {line}" for line in changed["validation"]]


def _row_of(source: dict[str, Any]) -> tuple[str, str, int]:
    """Return a source's name, the hash of its content, and its number of rows."""
    return source["resolved"], str(source["sha256"] or source["fingerprint"]), source["num_rows"]


def _in_words(source: tuple[str, str, int] | None) -> str:
    return "nothing" if source is None else f"{source[0]} with {source[2]:,} rows (hash {source[1][:12]})"


def changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, "path: before -> after") for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from changes(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, f"{path}: {before!r:.60} -> {after!r:.60}"
