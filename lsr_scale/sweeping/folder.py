"""The folder of a sweep: `sweep.json` has the state of each trial, and several processes may work on it at once."""

import contextlib
import dataclasses
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from lsr_scale import files
from lsr_scale.config.training import lower_is_better
from lsr_scale.config.trials import Sweep
from lsr_scale.errors import UserError
from lsr_scale.model import chosen_dtype, local_device
from lsr_scale.run.folder import SWEEP, RunFolder
from lsr_scale.sweeping import halving
from lsr_scale.version import __version__

Status = Literal["pending", "running", "paused", "finished", "stopped", "diverged", "failed"]
MOST_RUNGS = 1_000
ENDED: tuple[Status, ...] = ("finished", "stopped", "diverged", "failed")


@dataclass
class TrialState:
    """Where a trial is.

    Attributes:
        name: Its own, and its folder's.
        changes: The values of the run that it changes, by dotted keys.
        status: pending: to be started, or resumed; running; paused: at a rung, waiting to be compared; finished;
            stopped: at a rung; diverged: its numbers were not finite; failed.
        rung: Where it is compared next.
        rung_scores: What it had at the rungs before, None where it had no score.
        worker: Who trains it.
        overwrite: It is to start again in a folder that holds an earlier one.
        score: What it is sorted by; see `SweepFolder.score`.
        results: Some of its `results.json`.
        error: Why it diverged or failed.
    """

    name: str
    changes: dict[str, Any]
    status: Status = "pending"
    rung: int = 0
    rung_scores: list[float | None] = field(default_factory=list)
    worker: str | None = None
    overwrite: bool = False
    score: float | None = None
    results: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.status in ENDED


@dataclass
class SweepState:
    """What `sweep.json` says.

    Attributes:
        run: The run as it was written.
        sweep: The section.
        scored_by: What trials are compared by.
        trials: The trials, by name.
        dtype: What `model.dtype: auto` is in all of them, on whichever machine.
        notes: What a user should know before trials are compared.
    """

    run: dict[str, Any]
    sweep: dict[str, Any]
    scored_by: str
    trials: dict[str, TrialState]
    dtype: str = "bfloat16"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, sweep: Sweep) -> Self:
        """Return the state of a sweep that begins here."""
        trials = {trial.name: TrialState(trial.name, trial.changes) for trial in sweep.trials}
        dtype = chosen_dtype("auto", local_device())
        section, scored_by = sweep.section.model_dump(), sweep.scored_by()
        if section["stop"] is not None:  # so that it stays what it was when a default changes
            section["stop"]["metric"] = scored_by
        return cls(sweep.written, section, scored_by, trials, dtype, sweep.notes())

    @classmethod
    def of_json(cls, content: Any, path: Path) -> Self:
        """Return the state that a file's content tells.

        Raises:
            UserError: if it is no sweep's.
        """
        try:
            trials = {one["name"]: TrialState(**one) for one in content["trials"]}
            dtype = content.get("dtype", "bfloat16")  # as of the releases that had no auto
            notes = content.get("notes", [])
            return cls(content["run"], content["sweep"], content["scored_by"], trials, dtype, notes)
        except (KeyError, TypeError):
            raise UserError(f"{path}: is no sweep's, or another release's; move it away") from None

    def to_json(self) -> dict[str, Any]:
        """Return it as the content of a file."""
        parts = {"run": self.run, "sweep": self.sweep, "scored_by": self.scored_by, "dtype": self.dtype}
        parts |= {"notes": self.notes} if self.notes else {}
        return {"lsr_scale": __version__, **parts, "trials": [dataclasses.asdict(one) for one in self.trials.values()]}

    def ranked(self) -> list[TrialState]:
        """Return the trials, the best first; those that were stopped after those that were not, no score last."""
        sign = 1 if lower_is_better(self.scored_by) else -1

        def place(trial: TrialState) -> tuple[bool, int, float]:
            if trial.score is None or math.isnan(trial.score):
                return True, 0, 0.0
            return False, -trial.rung if trial.status in ("stopped", "paused") else -MOST_RUNGS, sign * trial.score

        return sorted(self.trials.values(), key=place)


@dataclass(frozen=True)
class SweepFolder:
    """Paths in a sweep's folder.

    sweep.json    each trial: what it changes, where it is, its scores    trials/NAME/  ordinary run folders
    sweep.md      a row a trial, the best first                           .sweep.lock   held while sweep.json changes
    losses.png    the loss curves of all                                  .workers/     a lock a process at work here
    rewards.png   of GRPO, in its place, the reward curves of all
    scores.png    scores against parameters and the learning rate
    """

    path: Path

    @property
    def state(self) -> Path:
        """The state of each trial."""
        return self.path / SWEEP

    @property
    def table(self) -> Path:
        """The trials, the best first, for people."""
        return self.path / "sweep.md"

    @property
    def losses(self) -> Path:
        """The loss curves of all trials, where they are not GRPO's."""
        return self.path / "losses.png"

    @property
    def rewards(self) -> Path:
        """The reward curves of all trials, where they are GRPO's."""
        return self.path / "rewards.png"

    @property
    def scores(self) -> Path:
        """Scores against parameters and against the learning rate."""
        return self.path / "scores.png"

    @property
    def workers(self) -> Path:
        """The locks of the processes at work."""
        return self.path / ".workers"

    def trial(self, name: str) -> RunFolder:
        """The folder of a trial, a run's."""
        return RunFolder(self.path / "trials" / name)

    def is_sweep(self) -> bool:
        """Tell whether a sweep has begun here."""
        return self.state.is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the state; waits for them."""
        with FileLock(self.path / ".sweep.lock"):
            yield

    def read(self) -> SweepState:
        """Return the state.

        Raises:
            UserError: if there is none.
        """
        return SweepState.of_json(files.read_json(self.state, "state of a sweep"), self.state)

    def write(self, state: SweepState) -> None:
        """Write the state; the caller holds the lock."""
        files.write_json(self.state, state.to_json())

    @contextlib.contextmanager
    def updating(self) -> Iterator[SweepState]:
        """Yield the state and write what was made of it; other processes wait."""
        with self.locked():
            state = self.read()
            yield state
            self.write(state)

    def alive(self, besides: str | None = None) -> set[str]:
        """Return the workers that are at work here; the system frees the lock of one that ended, killed or not."""
        found = set()
        for file in self.workers.glob("*.lock") if self.workers.is_dir() else ():
            if file.stem == besides:
                continue
            lock = FileLock(file, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                found.add(file.stem)
            except OSError:  # a storage without locks
                found.add(file.stem)
            else:
                file.unlink(missing_ok=True)
                lock.release()
        return found


class Worker:
    """A process that works on a sweep's trials, from `joined` on."""

    def __init__(self, folder: SweepFolder, say: Callable[[str], None] = lambda text: None) -> None:
        """Take the folder, and who is told of trials that were stopped."""
        self.folder, self.say = folder, say
        # not by its number alone: in a container it is often that of one that was killed
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Be at work here: what is claimed within is this worker's until it has ended."""
        self.folder.workers.mkdir(exist_ok=True)
        file = self.folder.workers / f"{self.name}.lock"
        lock = FileLock(file)
        with self.folder.locked():
            lock.acquire()
        try:
            yield
        finally:
            with self.folder.locked():
                file.unlink(missing_ok=True)
                lock.release()
                with contextlib.suppress(OSError):
                    self.folder.workers.rmdir()

    def claim(self, wanted: Callable[[str], bool] = lambda name: True) -> TrialState | None:
        """Return the next trial to train, which is this worker's now, or None where there is none at the moment.

        Args:
            wanted: Tells by its name whether a trial is one that can be taken now.
        """
        with self._compared() as state:
            for trial in state.trials.values():
                if trial.status == "pending" and wanted(trial.name):
                    trial.status, trial.worker = "running", self.name
                    return dataclasses.replace(trial)
        return None

    def look(self) -> SweepState:
        """Return the state, once it is decided what can be: whose worker has ended, and who goes on at a rung."""
        with self._compared() as state:
            return state

    def may_come(self) -> bool:
        """Tell whether there may be a trial to claim later: others are at work on trials that this one depends on."""
        with self._compared() as state:
            statuses = {trial.status for trial in state.trials.values()}
        return "pending" in statuses or ("running" in statuses and bool(state.sweep.get("stop")))

    @contextlib.contextmanager
    def _compared(self) -> Iterator[SweepState]:
        """Yield the state, to be changed, once it is decided what can be."""
        with self.folder.updating() as state:
            self._release_dead(state)
            stopped = halving.compare(state)
            yield state
        for trial in stopped:
            self.say(f"stopped at rung {trial.rung + 1}: {trial.name}")

    def _release_dead(self, state: SweepState) -> None:
        """Have trials started again whose workers have ended without a word."""
        running = [trial for trial in state.trials.values() if trial.status == "running" and trial.worker != self.name]
        alive = self.folder.alive(besides=self.name) if running else set()
        for trial in running:
            if trial.worker not in alive:
                trial.status, trial.worker = "pending", None
