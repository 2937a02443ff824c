"""Rows as they were read, where each came from, and what was read (a run folder's data.json says it)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lsr_scale.data.readers import has_lines

Row = Mapping[str, Any]


class RowError(ValueError):
    """What is wrong with one row, without saying where it stands; the caller knows the file and the line."""


def text_of(row: Row, *keys: str) -> str:
    """Return the text under the first of some columns that a row has.

    Raises:
        RowError: if none has one.
    """
    key = next((key for key in keys if row.get(key) is not None), keys[0])
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"expected a text under {key!r}, got {'nothing' if value is None else repr(value)[:60]}")
    return value


def filled_text_of(row: Row, *keys: str) -> str:
    """Return what `text_of` does.

    Raises:
        RowError: for a text of white space alone, too.
    """
    text = text_of(row, *keys)
    if not text.strip():
        key = next(key for key in keys if row.get(key) is not None)
        raise RowError(f"expected a text under {key!r}, got an empty one")
    return text


@dataclass(frozen=True)
class Provenance:
    """Where rows came from.

    Attributes:
        path: What was asked for.
        resolved: What was read: a file, `hub:<dataset>`, or the built-in set's name.
        name: Subset of a hub dataset.
        split: The split that was read, or None for a single file.
        sha256: Hash of the file (of the files in order, where a split is several), or None for a hub dataset.
        fingerprint: Content fingerprint of a hub dataset or of the built-in set, or None.
        num_rows: Rows handed on (after `limit`).
    """

    path: str
    resolved: str
    name: str | None
    split: str | None
    sha256: str | None
    fingerprint: str | None
    num_rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, with the task they belong to and the places to name when one is wrong.

    `label_names` are those of a ClassLabel feature named label, whose numbers the rows have; None without one.
    """

    rows: list[dict[str, Any]]
    task: str | None
    provenance: Provenance
    files: tuple["FilePart", ...] = ()
    label_names: tuple[str, ...] | None = None

    def where(self, index: int) -> str:
        """Return "file, line 12" for a row of a text file, "file, row 12" (from 1) for any other."""
        for part in self.files:
            if index < len(part.numbers):
                return f"{part.file}, {'line' if has_lines(part.file) else 'row'} {part.numbers[index]}"
            index -= len(part.numbers)
        return f"{self.provenance.resolved}, row {index + 1}"


@dataclass(frozen=True)
class FilePart:
    """The numbers, of lines or of rows, that a file's rows have in it."""

    file: Path
    numbers: list[int]
