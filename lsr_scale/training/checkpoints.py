"""Going on from a checkpoint: which one, whether it is whole, and whether this run and these processes fit it."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsr_scale import config, record
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.run_folder import RunFolder

MANIFEST, STATE, TENSORS = "manifest.json", "training_state.json", "training_state.safetensors"
_NEEDED = (STATE, TENSORS, "trainer_state.json", "adapter_model.safetensors", "adapter_config.json", "base.json")
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

# What must not change between a checkpoint and its continuation, or would not be heeded, for the optimizer's state has
# it too. Anything else may change, and is said.
_FIXED = re.compile(
    r"adapter\..*|model\.(task|num_labels|quantization|double_quantization|dtype)"
    r"|training\.(optim|optim_args|optim_target_modules|learning_rate|weight_decay|adam_beta1|adam_beta2|adam_epsilon)"
)
# Schedules that are no function of the step alone: what they keep, settings among it, is the checkpoint's.
_KEEP_THEIR_SETTINGS = ("reduce_lr_on_plateau", "greedy")


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file in a folder, and see all of it onto the disk."""
    record.share(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files}
    for file in files:
        record.sync(file)
    record.write_json(folder / MANIFEST, {"files": listed})
    record.sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files by its manifest, None if nothing is."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"there is no {MANIFEST} in it"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in listed.items():
            file = checkpoint / name
            if not file.is_file():
                return f"there is no {name} in it, which {MANIFEST} lists"
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} is cut short or altered: {size} bytes, {expected['bytes']} in {MANIFEST}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is altered: its SHA-256 is not that in {MANIFEST}"
        lacking = [name for name in _NEEDED if name not in listed]
        return f"{MANIFEST} does not list {lacking[0]}" if lacking else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def step(checkpoint: Path) -> int:
    """Return the training step after which a whole checkpoint was saved, whatever its folder is called."""
    return _state(checkpoint)["step"]


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def fit(checkpoint: Path, run: RunConfig, num_processes: int) -> RunConfig:
    """Return the run with its accumulation such that a step has as many rows as before, on these many processes.

    The position in the data is a number of steps, so a step must have the rows that it had; `check` refuses the rest.
    The accumulation given may be meant for as many processes as the run began with, or as saved the checkpoint.
    """
    if damage(checkpoint) is not None:
        return run
    state = _state(checkpoint)
    rows, batch, accumulation = state["rows_per_step"], *(run.training[name] for name in (_BATCH, _ACCUMULATION))
    meant_for = (state["first_num_processes"], state["num_processes"])
    if rows not in [batch * accumulation * number for number in meant_for]:
        return run  # another batch size or accumulation was asked for, which `check` judges
    return _accumulating(run, rows, num_processes)


def as_begun(checkpoint: Path, run: RunConfig) -> RunConfig:
    """Return the run that `fit` made with the accumulation of the processes that it began with, for its config.yaml.

    So that file can be gone on with on any number of processes, also before this part of the run saves a checkpoint.
    """
    state = _state(checkpoint)
    return _accumulating(run, state["rows_per_step"], state["first_num_processes"])


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
    before, rows = state["num_processes"], state["rows_per_step"]
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
    saved = RunFolder(checkpoint.parent)
    if not saved.is_run():
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


def changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, "path: before -> after") for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from changes(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, f"{path}: {before!r:.60} -> {after!r:.60}"
