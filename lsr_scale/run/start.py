"""How a run starts: which folder it writes to and which checkpoint it resumes from, decided once for all processes."""

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Self

from lsr_scale import config, distributed, files
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.model import chosen_dtype, local_device, save_tokenizer
from lsr_scale.paths import user_path
from lsr_scale.run.backup import Backup, restore
from lsr_scale.run.folder import SWEEP, RunFolder, step_of
from lsr_scale.run.lock import locked
from lsr_scale.run.metrics import truncate
from lsr_scale.run.rewards import reward_record
from lsr_scale.training.checkpoint import select
from lsr_scale.training.checkpoint.manifest import is_misnamed, read_state
from lsr_scale.training.run_data import RunData


@dataclass(frozen=True)
class Start:
    """What a run begins with; equal on every process.

    Attributes:
        run: As it was given, but for the gradient accumulation where another number of processes resumes it, and with
            the dtype that `model.dtype: auto` is: the main process's, or that of the run that resumes.
        folder: Where it writes.
        checkpoint: What it resumes from, None for a run from the beginning.
        step: After which it was saved, 0 without one; training may remove the checkpoint.
        in_place: The checkpoint is one of `folder`, so what lies there is this run's.
        notes: What the user should know of the choice, a line each.
    """

    run: RunConfig
    folder: RunFolder
    checkpoint: Path | None = None
    step: int = 0
    in_place: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def resuming(cls, run: RunConfig, folder: RunFolder, checkpoint: Path, notes: list[str]) -> Self:
        """Return the start of a run that `select.fit` returned for this checkpoint."""
        in_place = select.run_folder_of(checkpoint).path == folder.path.resolve()
        return cls(run, folder, checkpoint, read_state(checkpoint).step, in_place, notes)


def named_by_file(run: RunConfig, file: Path, again: bool) -> tuple[RunConfig, str]:
    """Return a run and the stem of its folder's name.

    Args:
        run: The run.
        file: What it was read from; a run's own config.yaml means that run, wherever it lies, also where it was moved
            from the folder that it names.
        again: It is resumed or overwritten.
    """
    folder = RunFolder(file.resolve().parent)
    if file.resolve() != folder.config or not folder.is_run():
        return run, file.stem
    named = run.training["output_dir"]
    if again if named is None else named == config.load_run(file).training["output_dir"]:
        run = run.model_copy(update={"training": {**run.training, "output_dir": str(file.parent)}})
    return run, file.resolve().parent.name


@contextmanager
def starting(run: RunConfig, name: str, resume: str | None, overwrite: bool) -> Iterator[Start]:
    """Decide how a run starts, and keep its folder from other runs until the context is left.

    The main process decides. On leaving, what an earlier run left is restored if this one has saved no checkpoint, and
    an empty folder is removed.

    Args:
        run: The run.
        name: Stem for the folder under `runs/` where the run names none.
        resume: "auto" for the newest checkpoint in the run's folder, or the path of a checkpoint.
        overwrite: Start again in a folder that holds a run.

    Raises:
        UserError: on every process alike, if the processes were started differently, the folder is taken, or the
            checkpoint does not fit.
    """
    _check_alike(run, resume, overwrite)
    with ExitStack() as claims:
        outcome: Any = None
        if distributed.is_main():
            try:
                outcome = _with_dtype(decide(run, name, resume, overwrite, claims))
            except UserError as error:
                outcome = str(error)
        if isinstance(outcome, Start):  # a run cannot be pickled; only this of it is not what was given
            decided = {name: getattr(outcome.run.model, name) for name in ("labels", "num_labels", "dtype")}
            outcome = {**vars(outcome), "run": (outcome.run.training, decided)}
        outcome = distributed.broadcast(outcome)
        if isinstance(outcome, str):
            raise UserError(outcome)
        training, decided = outcome["run"]
        changed = {"training": training, "model": run.model.model_copy(update=decided)}
        yield Start(**{**outcome, "run": run.model_copy(update=changed)})


def _with_dtype(start: Start) -> Start:
    """Return a start whose run names its dtype."""
    dtype = chosen_dtype(start.run.model.dtype, local_device())
    return replace(start, run=start.run.with_model(dtype=dtype))


def decide(run: RunConfig, name: str, resume: str | None, overwrite: bool, claims: ExitStack) -> Start:
    """Return how a run starts, its folder claimed until `claims` is left; for the arguments see `starting`.

    Raises:
        UserError: if the folder is taken, or there is no checkpoint that the run can resume from.
    """
    if resume and overwrite:
        raise UserError("--resume resumes a run, --overwrite starts it again: give one of them")
    output_dir, num_processes = run.training["output_dir"], distributed.world_size()
    if resume not in (None, "auto"):
        checkpoint = user_path(resume, "--resume")
        home = select.run_folder_of(checkpoint)
        restore(home)
        run, notes = select.fit(checkpoint, run, num_processes)
        same = output_dir is None or user_path(output_dir, "training.output_dir").resolve() == home.path
        folder = claims.enter_context(claim(output_dir or str(home.path), name, same, overwrite))
        return Start.resuming(run, folder, checkpoint, notes)
    folder = claims.enter_context(claim(output_dir, name, resume == "auto", overwrite))
    if resume is None:
        chosen = overwrite or output_dir is not None
        return Start(run, folder, notes=[] if chosen else _interrupted_before(folder, name))
    newest, skipped = select.newest(folder)
    if newest is not None:
        run, notes = select.fit(newest, run, num_processes)
        return Start.resuming(run, folder, newest, [*skipped, *notes])
    if folder.has_adapter():
        raise UserError(
            f"{folder.path}: the run is finished, and no complete checkpoint is left to resume from; --overwrite "
            "starts it again"
        )
    if skipped:
        raise UserError(
            f"{folder.path}: no checkpoint is complete; repair or remove them, or --overwrite starts again\n"
            + "\n".join(skipped)
        )
    return Start(run, folder)


@contextmanager
def claim(output_dir: str | None, name: str, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Keep the folder for a run that starts now; it exists, can be written, and nothing in it is in the run's way.

    Without `output_dir` it is `runs/NAME`, or `runs/NAME-2` and so on where that is taken; resuming and overwriting
    take the newest of them that holds a run. What a run that was killed before its first checkpoint had set aside is
    restored first.

    Args:
        output_dir: `training.output_dir`.
        name: Stem of the configuration file.
        resume: Continue the run that lies there, if one does.
        overwrite: Start again in a folder that holds a run.

    Raises:
        UserError: if the folder is taken, holds what no run wrote where this one would write, or cannot be made or
            written.
    """
    folder = _find(output_dir, name, resume or overwrite)
    try:
        with locked(folder.path):
            _recover(folder)
            _check_free(folder, resume or overwrite)
            try:
                yield folder
            finally:
                Backup(folder).settle_or_leave()
    finally:
        folder.release()


def begin(start: Start, data: RunData) -> list[str]:
    """Make the folder this run's, once its data and model are ready; every process takes part.

    What an earlier run left is set aside until this one has saved a checkpoint; the checkpoints among it are returned.

    Raises:
        UserError: if something cannot be written.
    """
    outdated = []
    if distributed.is_main():
        folder, after = start.folder, start.step if start.in_place else -1
        outdated = _outdated(start, after)
        if start.in_place:
            rewritten = [folder.config, folder.environment, folder.data, folder.metrics, folder.samples]
            rewritten += [folder.completions, folder.reward_record]
            Backup(folder).set_aside(outdated, [*rewritten, folder.compute_errors], after)
        else:
            Backup(folder).set_aside([*folder.written(), *outdated], (), after)
        folder.remove_left_over()
        for path in (folder.nonfinite, folder.samples, folder.completions):
            if start.in_place and path.exists():  # the later steps are repeated, and recorded again
                truncate(path, after)
        files.write_json(folder.environment, files.environment())
        files.write_json(folder.data, {**data.sources, "kind": data.kind})
        if start.run.training.get("reward"):
            files.write_json(folder.reward_record, reward_record(start.run))
        save_tokenizer(data.tokenizer, folder.tokenizer)
        as_begun = start.run if start.checkpoint is None else select.as_begun(start.checkpoint, start.run)
        files.write_text(folder.config, config.dump_yaml(as_begun))  # last: it makes the folder a run
    distributed.broadcast(None)  # nobody writes before that
    return [path.name for path in outdated]


def _outdated(start: Start, after: int) -> list[Path]:
    """Return the checkpoints of an earlier run, or of this one later than the step that it resumes from."""
    later = [path for path in start.folder.own_checkpoints() if step_of(path) > after]
    # somebody renamed or copied the misnamed ones, and may miss them
    return [path for path in later if not is_misnamed(path)] if start.in_place else later


def _check_alike(run: RunConfig, resume: str | None, overwrite: bool) -> None:
    """Raise, on every process, where one of them was started with another run or other options than the first."""
    started = distributed.gather([{**run.model_dump(), "--resume": resume, "--overwrite": overwrite}])
    for rank, other in enumerate(started):
        if differing := [text for _, text in select.changes(started[0], other)]:
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise UserError(
                f"rank {rank} was started with another configuration than rank 0: {'; '.join(differing[:8])}{more}; "
                "start all processes with one file and the same options"
            )


def _find(output_dir: str | None, name: str, again: bool) -> RunFolder:
    """Return the run's folder, made if it is new."""
    if output_dir is not None:
        folder = RunFolder(user_path(output_dir, "training.output_dir"))
        folder.make()
        return folder
    taken: list[RunFolder] = []
    folders = _numbered(name)
    while True:
        folder = next(folders)
        if os.path.lexists(folder.path):
            taken.append(folder)
        elif again and (runs := [one for one in taken if one.is_marked() or one.earlier.is_dir()]):
            runs[-1].make()
            return runs[-1]
        elif folder.make():
            return folder


def _numbered(name: str) -> Iterator[RunFolder]:
    """Return the folders that a run of this name may have, in the order in which they are taken."""
    name = name.lstrip(".") or "run"  # neither hidden nor the folder above
    return (RunFolder(Path("runs") / (name if index == 1 else f"{name}-{index}")) for index in count(1))


def _interrupted_before(folder: RunFolder, name: str) -> list[str]:
    """Return a line on the run before this one, where it has no adapter: what could have been meant is to resume it."""
    runs = [one for one in takewhile(lambda one: one.path != folder.path, _numbered(name)) if one.is_run()]
    if not runs or runs[-1].has_adapter():
        return []
    before = runs[-1].path
    again = f"to start it again: --overwrite --set {shlex.quote(f'training.output_dir={before}')}"
    with suppress(UserError), locked(before):  # or it is under way
        checkpoint, _ = select.newest(runs[-1])
        if checkpoint is None:
            return [
                f"{before} holds an interrupted run without a checkpoint; this one goes into {folder.path}; {again}"
            ]
        return [
            f"{before} holds an interrupted run (newest checkpoint: {checkpoint.name}); this one goes into "
            f"{folder.path}; to resume that one: --resume {checkpoint}; {again}"
        ]
    return []


def _recover(folder: RunFolder) -> None:
    """Finish or undo what a run that was killed here was in the middle of."""
    checkpoints = (folder.path / old.name[1:-4] for old in folder.path.glob(".checkpoint-*.old"))
    for path in (folder.adapter, folder.lora, folder.tokenizer, *checkpoints):
        files.finish_replacing(path)
    Backup(folder).settle()


def _check_free(folder: RunFolder, again: bool) -> None:
    """Refuse a folder that holds a sweep, or a run unless it is resumed or overwritten, or what no run wrote."""
    if (folder.path / SWEEP).is_file():
        raise UserError(
            f"{folder.path}: holds a sweep, and a run has a folder of its own; go elsewhere with --set "
            "training.output_dir=..."
        )
    if folder.is_run() and not again:
        raise UserError(
            f"{folder.path}: holds a run already; --resume auto continues it, --overwrite starts it again, "
            "--set training.output_dir=... goes elsewhere"
        )
    if others := folder.in_the_way():
        names = ", ".join(path.name for path in others[:6]) + (", ..." if len(others) > 6 else "")
        what = "holds" if folder.is_run() else "is no run's folder, but holds"
        raise UserError(
            f"{folder.path}: {what} {names}, which no run wrote and this one would write over; move "
            f"{'them' if len(others) > 1 else 'it'} away, or go elsewhere with --set training.output_dir=..."
        )
