"""The rows of a sweep's trials, read and tokenized once for all that have the same ones."""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.config.alike import rows_key
from lsr_scale.training.checkpoint import select
from lsr_scale.training.run_data import RunData, read_data

MOST = 8  # kept at a time: trials of the same rows follow one another, but where a grid's last key changes the data


@dataclasses.dataclass(frozen=True)
class _Kept:
    data: RunData
    said: list[str]
    tokenizer_state: tuple[Any, Any]  # when a run saves it


class TrialRows:
    """What `read_data` returns, and what a trainer makes of it, of the runs that came last.

    Files are read when the first of such runs begins; one that is changed while the sweep is under way is not read
    again. The tokenizer is one for all, and as a run alone has it when the next one begins.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._read: tuple[str, RunData, list[str]] | None = None  # what was read last; not yet known to fit the model

    def read(
        self, run: RunConfig, checkpoint: Path | None = None, say: Callable[[str], None] = lambda text: None
    ) -> RunData:
        """Return a run's rows and tokenizer, and say of them what `read_data` says; see there."""
        key = rows_key(run) + _tokenizer_digest(checkpoint)
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            _set_state(kept.data.tokenizer, kept.tokenizer_state)
            data, said = kept.data, kept.said
        elif self._read is not None and self._read[0] == key and self._read[1].made.notes is None:
            _, data, said = self._read
        else:
            return self._read_anew(key, run, checkpoint, say)
        for line in said:
            say(line)
        return data

    def _read_anew(self, key: str, run: RunConfig, checkpoint: Path | None, say: Callable[[str], None]) -> RunData:
        said: list[str] = []

        def say_and_keep(text: str) -> None:
            said.append(text)
            say(text)

        self._read = None
        data = read_data(run, checkpoint, say_and_keep)
        self._read = key, data, said
        return data

    def keep(self, data: RunData) -> None:
        """Keep what was read, now that a trainer has been made of it."""
        if self._read is not None and self._read[1] is data:
            key, _, said = self._read
            self._read, self._kept[key] = None, _Kept(data, said, _state(data.tokenizer))
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)


def _tokenizer_digest(checkpoint: Path | None) -> str:
    """Return a digest of the tokenizer that a run resumes with, "" for one that begins."""
    if checkpoint is None:
        return ""
    sha256 = hashlib.sha256()
    folder = select.run_folder_of(checkpoint).tokenizer
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            sha256.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return sha256.hexdigest()


def _state(tokenizer: Any) -> tuple[Any, Any]:
    """Return what the last call left in a fast tokenizer, and it saves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (None, None) if backend is None else (backend.truncation, backend.padding)


def _set_state(tokenizer: Any, state: tuple[Any, Any]) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    truncation, padding = state
    backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
    backend.enable_padding(**padding) if padding else backend.no_padding()
