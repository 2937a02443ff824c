"""How a run gets its folder: chosen, locked, and what stood there kept until the new run has saved a step."""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.run.folder import MANIFEST, RunFolder, step_of


def choose(output_dir: str | None, name: str, resume: bool, overwrite: bool, lock: ExitStack) -> RunFolder:
    """Return the folder for a run that starts now; it exists, can be written, and nothing in it is in the run's way.

    Without `output_dir` it is `runs/NAME`, or `runs/NAME-2` and so on where that is taken; resuming and overwriting
    take the newest of them that holds a run. What a run that was killed before its first checkpoint had set aside is
    put back first.

    Args:
        output_dir: `training.output_dir`.
        name: Stem of the configuration file.
        resume: Continue the run that lies there, if one does.
        overwrite: Start again in a folder that holds a run.
        lock: Keeps other processes' runs out of the folder until it is left.

    Raises:
        UserError: if the folder is taken, holds what no run wrote where this one would write, or cannot be made or
            written.
    """
    folder = _find(output_dir, name, resume or overwrite)
    lock.enter_context(folder.held())
    checkpoints = (folder.path / old.name[1:-4] for old in folder.path.glob(".checkpoint-*.old"))
    for path in (folder.adapter, folder.tokenizer, *checkpoints):
        files.finish_replacing(path)
    Earlier(folder).settle()
    if folder.is_run() and not resume and not overwrite:
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
    return folder


def recover(folder: RunFolder) -> None:
    """Put back what a run that was killed before its first checkpoint had set aside.

    Raises:
        UserError: if that run is still going on.
    """
    if folder.earlier.is_dir():
        with folder.held():
            Earlier(folder).settle()


def _find(output_dir: str | None, name: str, again: bool) -> RunFolder:
    if output_dir is not None:
        folder = RunFolder(user_path(output_dir, "training.output_dir"))
        folder.claim()
        return folder
    name = name.lstrip(".") or "run"  # neither hidden nor the folder above
    taken: list[RunFolder] = []
    index = 1
    while True:
        folder = RunFolder(Path("runs") / (name if index == 1 else f"{name}-{index}"))
        if os.path.lexists(folder.path):
            taken.append(folder)
        elif again and (runs := [one for one in taken if one.is_marked() or one.earlier.is_dir()]):
            runs[-1].claim()
            return runs[-1]
        elif folder.claim():
            return folder
        index += 1


class Earlier:
    """What stood in a run's folder before a run began there: set aside until that run has saved a step.

    A run that ends before, by an error, a signal or a kill, takes nothing with it: `settle` puts all of it back, at the
    run's own end or when the next one starts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._notes = folder.earlier / "state.json"

    def keep(self, moved: Iterable[Path], copied: Iterable[Path], after: int) -> None:
        """Set files and checkpoints aside.

        Args:
            moved: What is in the new run's way.
            copied: What it begins with, and writes anew.
            after: The step from which it goes on, -1 for none. It has saved a step once a later checkpoint is there.

        Raises:
            UserError: if they cannot be moved or copied; `settle` brings back what was.
        """
        moved, copied = list(moved), [path for path in copied if path.is_file()]
        if not moved and not copied:
            return
        there = [path.name for path in self.folder.checkpoints() if path not in moved]
        state = {"whole": False, "after": after, "copied": [path.name for path in copied], "not_new": there}
        try:
            self.folder.earlier.mkdir()
            files.write_json(self._notes, state)
            for path in copied:
                shutil.copy2(path, self.folder.earlier / path.name)
            for path in moved:
                place = self.folder.earlier / path.relative_to(self.folder.path)
                place.parent.mkdir(exist_ok=True)
                path.rename(place)
            for emptied in {path.parent for path in moved} - {self.folder.path}:
                with suppress(OSError):  # what no run wrote stays there
                    emptied.rmdir()
            files.write_json(self._notes, {**state, "whole": True})
        except OSError as error:
            raise files.cannot_write(self.folder.earlier, error) from error

    def drop(self) -> None:
        """Remove what was set aside: the new run has saved a step."""
        if not self.folder.earlier.is_dir():
            return
        for path in self.folder.earlier.iterdir():
            if path != self._notes:
                files.remove(path)
        files.remove(self.folder.earlier)  # the notes last, for a kill on the way

    def settle(self) -> None:
        """Remove what was set aside if the new run has saved a step, else put it back, and say so."""
        if not self.folder.earlier.is_dir():
            return
        state = self._state()
        if state["whole"] and self._has_saved(state):
            self.drop()
            return
        if state["whole"]:
            if state["after"] < 0:
                self._remove_failed()
            files.write_json(self._notes, {**state, "whole": False})  # from here on nothing is removed any more
        moved = [path for path in self._entries() if path.name not in state["copied"]]
        for path in self._entries():
            target = self.folder.path / path.relative_to(self.folder.earlier)
            if not os.path.lexists(target) or path.name in state["copied"]:
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        left = self._entries()
        if moved:
            words = "the run that began here ended before it saved a step; what it found here is back"
            if left:
                words += f", but for {', '.join(path.name for path in left)}, in {self._kept_for_good()}"
            print(f"note: {self.folder.path}: {words}", file=sys.stderr, flush=True)
        files.remove(self.folder.earlier)

    def settle_at_the_end(self) -> None:
        """Settle as a run ends, whose own error is the one to see; what cannot be put back now waits for the next."""
        try:
            self.settle()
        except (OSError, UserError) as error:
            words = f"what it found here is in {self.folder.earlier} until the next run starts ({error})"
            print(f"note: {self.folder.path}: {words}", file=sys.stderr, flush=True)

    def _kept_for_good(self) -> Path:
        """Give what cannot be put back, since something else lies there now, a folder that no run touches."""
        self._notes.unlink(missing_ok=True)
        names = ("earlier-run", *(f"earlier-run-{number}" for number in range(2, 1000)))
        target = next(path for name in names if not os.path.lexists(path := self.folder.path / name))
        return self.folder.earlier.rename(target)

    def _state(self) -> dict[str, Any]:
        """Return what `keep` noted; nothing was moved before it was."""
        try:
            state = files.read_json(self._notes, "record of what is set aside")
            return {"whole": state["whole"] is True, "after": int(state["after"])} | {
                name: [str(item) for item in state[name]] for name in ("copied", "not_new")
            }
        except (ValueError, TypeError, KeyError):
            return {"whole": False, "after": -1, "copied": [], "not_new": []}

    def _has_saved(self, state: dict[str, Any]) -> bool:
        found = [path for path in self.folder.checkpoints() if path.name not in state["not_new"]]
        saved = any(step_of(path) > state["after"] and (path / MANIFEST).is_file() for path in found)
        return saved or (state["after"] < 0 and self.folder.has_adapter())

    def _remove_failed(self) -> None:
        """Remove what the run wrote that took the place of the one before and saved no step."""
        noted = self.folder.nonfinite  # its last words name this file
        for path in self.folder.written():
            if path != noted:
                files.remove(path)
        if noted.is_file() and (self.folder.earlier / noted.name).exists():
            noted.replace(noted.with_name("nonfinite-failed.jsonl"))

    def _entries(self) -> list[Path]:
        """Return the files and checkpoints that are set aside."""
        found = []
        for path in sorted(self.folder.earlier.iterdir()):
            is_checkpoint = path.name.startswith("checkpoint-")
            if path.is_dir() and not path.is_symlink() and not is_checkpoint:
                found += sorted(path.iterdir())
            elif path != self._notes and not path.name.endswith(".part"):
                found.append(path)
        return found
