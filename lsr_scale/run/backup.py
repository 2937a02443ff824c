"""What an earlier run left in a folder, set aside until the run that began there after it has saved a checkpoint."""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import files
from lsr_scale.errors import UserError
from lsr_scale.run.folder import MANIFEST, RunFolder, step_of
from lsr_scale.run.lock import locked


class Backup:
    """The earlier run's files, in `.earlier-run/` of the folder that a new run writes to.

    A new run that ends before its first checkpoint, by an error, a signal or a kill, takes nothing with it: `settle`
    restores all that was set aside, at the new run's end or, after a kill, when the next run starts. One that has saved
    a checkpoint discards it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._state_file = folder.earlier / "state.json"

    def set_aside(self, moved: Iterable[Path], copied: Iterable[Path], after: int) -> None:
        """Move and copy files and checkpoints into the backup.

        Args:
            moved: What is in the new run's way.
            copied: What it begins with, and writes anew.
            after: The step that it resumes from, -1 for none. It has saved a checkpoint once there is a later one.

        Raises:
            UserError: if they cannot be moved or copied; `settle` restores what was.
        """
        moved, copied = list(moved), [path for path in copied if path.is_file()]
        if not moved and not copied:
            return
        not_new = [path.name for path in self.folder.checkpoints() if path not in moved]
        state = {"whole": False, "after": after, "copied": [path.name for path in copied], "not_new": not_new}
        try:
            self.folder.earlier.mkdir()
            files.write_json(self._state_file, state)
            for path in copied:
                shutil.copy2(path, self.folder.earlier / path.name)
            for path in moved:
                target = self.folder.earlier / path.relative_to(self.folder.path)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
            for emptied in {path.parent for path in moved} - {self.folder.path}:
                with suppress(OSError):  # what no run wrote stays there
                    emptied.rmdir()
            files.write_json(self._state_file, {**state, "whole": True})
        except OSError as error:
            raise files.cannot_write(self.folder.earlier, error) from error

    def discard(self) -> None:
        """Remove the backup: the new run has saved a checkpoint, or its adapter."""
        if not self.folder.earlier.is_dir():
            return
        for path in self.folder.earlier.iterdir():
            if path != self._state_file:
                files.remove(path)
        files.remove(self.folder.earlier)  # its state last, in case a kill comes in between

    def settle(self) -> None:
        """Discard the backup if the new run has saved a checkpoint, else restore it, and say so."""
        if not self.folder.earlier.is_dir():
            return
        state = self._state()
        if state["whole"] and self._has_saved(state):
            self.discard()
            return
        if state["whole"]:
            if state["after"] < 0:
                self._remove_failed()
            files.write_json(self._state_file, {**state, "whole": False})  # from here on nothing more is removed
        self._restore(copied=state["copied"])

    def settle_or_leave(self) -> None:
        """Settle as a run ends, whose own error is the one to see; what cannot be restored waits for the next run."""
        try:
            self.settle()
        except (OSError, UserError) as error:
            words = f"what the earlier run left is in {self.folder.earlier} until the next run starts ({error})"
            print(f"note: {self.folder.path}: {words}", file=sys.stderr, flush=True)

    def _restore(self, copied: list[str]) -> None:
        entries = self._entries()
        for path in entries:
            target = self.folder.path / path.relative_to(self.folder.earlier)
            if path.name in copied or not os.path.lexists(target):
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        if any(path.name not in copied for path in entries):
            words = "the run that began here ended before it saved a checkpoint; the earlier run is restored"
            if blocked := self._entries():
                words += f", but for {', '.join(path.name for path in blocked)}, in {self._rename_for_good()}"
            print(f"note: {self.folder.path}: {words}", file=sys.stderr, flush=True)
        files.remove(self.folder.earlier)

    def _rename_for_good(self) -> Path:
        """Give what cannot be restored, since something else lies in its place, a folder that no run touches."""
        self._state_file.unlink(missing_ok=True)
        names = ("earlier-run", *(f"earlier-run-{number}" for number in range(2, 1000)))
        target = next(path for name in names if not os.path.lexists(path := self.folder.path / name))
        return self.folder.earlier.rename(target)

    def _state(self) -> dict[str, Any]:
        """Return what `set_aside` recorded; nothing was moved before it was."""
        try:
            state = files.read_json(self._state_file, "record of what is set aside")
            return {"whole": state["whole"] is True, "after": int(state["after"])} | {
                name: [str(item) for item in state[name]] for name in ("copied", "not_new")
            }
        except (ValueError, TypeError, KeyError):
            return {"whole": False, "after": -1, "copied": [], "not_new": []}

    def _has_saved(self, state: dict[str, Any]) -> bool:
        """Tell whether the new run has saved a checkpoint, or an adapter where it did not resume."""
        new = [path for path in self.folder.checkpoints() if path.name not in state["not_new"]]
        saved = any(step_of(path) > state["after"] and (path / MANIFEST).is_file() for path in new)
        return saved or (state["after"] < 0 and self.folder.has_adapter())

    def _remove_failed(self) -> None:
        """Remove what a run wrote that saved no checkpoint, but for the batches that it ended with."""
        nonfinite = self.folder.nonfinite  # its last words name this file
        for path in self.folder.written():
            if path != nonfinite:
                files.remove(path)
        if nonfinite.is_file() and (self.folder.earlier / nonfinite.name).exists():
            nonfinite.replace(nonfinite.with_name("nonfinite-failed.jsonl"))

    def _entries(self) -> list[Path]:
        """Return the files and checkpoints in the backup."""
        entries: list[Path] = []
        for path in sorted(self.folder.earlier.iterdir()):
            is_checkpoint = path.name.startswith("checkpoint-")
            if path.is_dir() and not path.is_symlink() and not is_checkpoint:
                entries += sorted(path.iterdir())
            elif path != self._state_file and not path.name.endswith(".part"):
                entries.append(path)
        return entries


class DiscardBackup(TrainerCallback):
    """Removes what an earlier run left in the folder once a checkpoint of this run is saved."""

    def __init__(self, folder: RunFolder) -> None:
        self.backup = Backup(folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove it, on the main process."""
        if state.is_world_process_zero:
            self.backup.discard()


def restore(folder: RunFolder) -> None:
    """Settle what a run that was killed in this folder had set aside.

    Raises:
        UserError: if that run is still under way.
    """
    if folder.earlier.is_dir():
        with locked(folder.path):
            Backup(folder).settle()
