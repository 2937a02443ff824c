"""The folder of a run: where it lies, what is in it, and how a new one is kept from overwriting an old one."""

import contextlib
import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.record import cannot_write

# Locks that this process has. One is gone when all have closed its file: a loader's worker is not to keep it.
_HELD: set[TextIO] = set()
os.register_at_fork(after_in_child=lambda: [stream.close() for stream in _HELD])


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder. `config.yaml` marks it as one.

    config.yaml        the resolved run            adapter/        the adapter, as PEFT saves it, with base.json
    env.json           versions and machine        checkpoint-*/   what resuming needs
    metrics.jsonl      one line a logging step     eval/           predictions before and after
    loss.png           the loss curve              results.json    counts, times, accuracies
    nonfinite.jsonl    batches without a finite loss, and steps without a finite gradient
    condition.png      how far the terms of LSR-Adapt's sums cancel
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logging step."""
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def condition(self) -> Path:
        """The condition numbers over the steps, for methods that have them."""
        return self.path / "condition.png"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def results(self) -> Path:
        """Counts, times, accuracies."""
        return self.path / "results.json"

    @property
    def nonfinite(self) -> Path:
        """One JSON object a batch whose loss was not finite, or a step whose gradient was not."""
        return self.path / "nonfinite.jsonl"

    def predictions(self, task: str, when: str) -> Path:
        """The predictions of a task, `when` being "before", "after" or the name of another evaluation."""
        return self.path / "eval" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', task)}-{when}.jsonl"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the oldest first; one that a kill cut short is among them."""
        return sorted(
            (path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()), key=step_of
        )

    def is_run(self) -> bool:
        """Tell whether a run was started here."""
        return self.config.is_file()

    def written(self) -> list[Path]:
        """Return what lies here under the names that a run gives, checkpoints aside; a run that starts removes it."""
        folders = self.adapter, self.path / "eval"
        files = self.metrics, self.curve, self.condition, self.results, self.nonfinite
        return [path for path in (*folders, *files) if path.exists()]

    def claim(self) -> bool:
        """Make the folder and see that it can be written; return False if it was there already.

        Raises:
            UserError: if it cannot be made or written.
        """
        try:
            try:
                self.path.mkdir(parents=True)
                is_new = True
            except FileExistsError:
                is_new = False
                if not self.path.is_dir():
                    raise UserError(f"{self.path}: expected a folder for the run, got a file; name another") from None
            with tempfile.TemporaryFile(dir=self.path):
                return is_new
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes' runs out of the folder.

        Raises:
            UserError: if a run is going on here.
        """
        file = self.path / ".lock"
        with contextlib.ExitStack() as stack:
            try:
                stream = stack.enter_context(file.open("a+", encoding="utf-8"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                whose = stream.read().strip() or "it began just now"
                raise UserError(
                    f"{self.path}: a run is going on here ({whose}); wait for its end, or go elsewhere with "
                    "--set training.output_dir=..."
                ) from None
            except OSError:  # some network storage has no locks
                yield
                return
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
            stack.callback(file.unlink, missing_ok=True)
            stack.callback(_HELD.discard, stream)
            _HELD.add(stream)
            yield

    def release(self) -> None:
        """Remove the folder if nothing is in it: a run that never began leaves none."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def step_of(checkpoint: Path) -> int:
    """Return the training step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def open_run(path: str | Path) -> RunFolder:
    """Return an existing run folder.

    Raises:
        UserError: if there is none.
    """
    folder = RunFolder(user_path(path))
    if not folder.is_run():
        runs = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        known = f"; runs here: {', '.join(f'runs/{name}' for name in runs[:8])}" if runs else ""
        raise UserError(f"{path}: not a run folder (there is no config.yaml in it){known}")
    return folder


def choose(output_dir: str | None, name: str, resume: bool, overwrite: bool) -> RunFolder:
    """Return the folder for a run that starts now; it exists, and can be written.

    Without `output_dir` it is `runs/NAME`, or `runs/NAME-2` and so on where that is taken; resuming takes the newest of
    them. A named folder that holds a run already is refused unless the run is resumed or overwritten.

    Args:
        output_dir: `training.output_dir`.
        name: Stem of the configuration file.
        resume: Continue the run that lies there, if one does.
        overwrite: Start again in a folder that holds a run.

    Raises:
        UserError: if the folder is taken, or cannot be made or written.
    """
    if output_dir is not None:
        folder = RunFolder(user_path(output_dir, "training.output_dir"))
        if folder.is_run() and not resume and not overwrite:
            raise UserError(
                f"{folder.path}: holds a run already; --resume auto continues it, --overwrite starts it again, "
                "--set training.output_dir=... goes elsewhere"
            )
        goes_on = folder.is_run() or (resume and folder.checkpoints())
        if not overwrite and not goes_on and (there := [*folder.written(), *folder.checkpoints()]):
            raise UserError(
                f"{folder.path}: is no run's folder (there is no config.yaml in it), but holds "
                f"{', '.join(path.name for path in there[:6])}, which a run would write over; --overwrite removes "
                "them, --set training.output_dir=... goes elsewhere"
            )
        folder.claim()
        return folder
    taken: list[RunFolder] = []
    index = 1
    while True:
        folder = RunFolder(Path("runs") / (name if index == 1 else f"{name}-{index}"))
        if folder.path.exists():
            taken.append(folder)
        elif taken and (resume or overwrite):
            taken[-1].claim()
            return taken[-1]
        elif folder.claim():
            return folder
        index += 1
