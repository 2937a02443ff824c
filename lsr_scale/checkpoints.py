"""Going on from a checkpoint: which one, whether it is whole, and whether this run and these processes fit it."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lsr_scale import config
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.run_folder import RunFolder

# What must not change between a checkpoint and its continuation, or would not be heeded, for the optimizer's state has
# it too. Anything else may change, and is said.
_FIXED = re.compile(
    r"adapter\..*|model\.(task|num_labels|quantization|double_quantization|dtype)"
    r"|training\.(optim|learning_rate|weight_decay)"
)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if nothing is; one cut short lacks its last file."""
    state = checkpoint / "trainer_state.json"  # written after everything else
    if not state.is_file():
        return "there is no trainer_state.json in it" if checkpoint.is_dir() else "there is no such folder"
    try:
        step(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"trainer_state.json cannot be read ({error})"
    for file in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("global_step*/*.pt"))):
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} is damaged or cut short"
    for file in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            return f"{file.name} is damaged or cut short ({error})"
    return None


def step(checkpoint: Path) -> int:
    """Return the training step after which a whole checkpoint was saved, whatever its folder is called."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def newest(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, and a line about each newer one that is not whole."""
    notes = []
    for checkpoint in reversed(folder.checkpoints()):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, notes
        notes.append(f"{checkpoint} is left out: {problem}")
    return None, notes


def check(checkpoint: Path, run: RunConfig, num_processes: int, uses_deepspeed: bool) -> list[str]:
    """Return what changed since a checkpoint was saved, one line each.

    Args:
        checkpoint: The checkpoint, in a run's folder.
        run: The run that shall go on from it.
        num_processes: How many processes train now.
        uses_deepspeed: Whether they do under DeepSpeed.

    Raises:
        UserError: if the checkpoint is damaged, was saved by other processes than these, or by a run of another model
            or adapter.
    """
    problem = damage(checkpoint)
    if problem is not None:
        raise UserError(f"--resume {checkpoint}: not a checkpoint to go on from: {problem}")
    before, had_deepspeed = _saved_by(checkpoint)
    if (had_deepspeed, before if had_deepspeed else 0) != (uses_deepspeed, num_processes if uses_deepspeed else 0):
        engine = "DeepSpeed" if had_deepspeed else "no DeepSpeed"
        remedy = (
            f"deepspeed --num_gpus {before} launch/train.py"
            if had_deepspeed
            else "lsr-scale train"
            if before == 1
            else f"torchrun --nproc_per_node {before} launch/train.py, with deepspeed.config: null"
        )
        raise UserError(
            f"--resume {checkpoint}: saved by {before} process(es) under {engine}; its optimizer state fits only the "
            f"same number and engine: {remedy}"
        )
    notes = [] if before == num_processes else [f"{before} process(es) saved the checkpoint, {num_processes} go on"]
    saved = RunFolder(checkpoint.parent)
    if not saved.is_run():
        return [*notes, f"there is no config.yaml beside {checkpoint.name} to compare the run with"]
    changes = list(_changes(config.load_run(saved.config).model_dump(), run.model_dump()))
    fixed = [text for path, text in changes if _FIXED.fullmatch(path)]
    if fixed:
        raise UserError(
            f"--resume {checkpoint}: saved by a run with another {'; '.join(fixed)}; go on with its own configuration: "
            f"--config {saved.config}"
        )
    return [*notes, *(f"changed since the run began: {text}" for path, text in changes if not path.endswith("_dir"))]


def _saved_by(checkpoint: Path) -> tuple[int, bool]:
    """Return how many processes saved a checkpoint, and whether they did under DeepSpeed."""
    states = len(list(checkpoint.glob("rng_state_*.pth")))
    return max(1, states), (checkpoint / "latest").is_file()


def _changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, "path: before -> after") for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from _changes(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, f"{path}: {before!r:.60} -> {after!r:.60}"
