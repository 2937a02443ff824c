"""Rows from anywhere: a hub dataset, a local file or folder, the set that comes with the package.

What was read is written down beside the rows (`Provenance`), so that a run folder can say what it was trained on.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lsr_scale.data.tasks import TASKS, Task, check_task
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import user_path

BUILTIN = "builtin:commonsense"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
# The order in which a folder without a known task is searched for something to score, as lm-eval prefers test.
EVAL_SPLITS = ("test", "validation", "heldout", "dev")


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
    """Rows as they were read, with the task they belong to and the places to name when one is wrong."""

    rows: list[dict[str, Any]]
    task: str | None
    provenance: Provenance
    lines: list[int] | None = None

    def where(self, index: int) -> str:
        """Return "file, line 12" for a row of a text file, "source, row 12" (from 1) for any other."""
        place = self.provenance.resolved
        return f"{place}, line {self.lines[index]}" if self.lines else f"{place}, row {index + 1}"


def load_rows(
    path: str,
    *,
    name: str | None = None,
    split: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    default_split: str | None = "train",
) -> Rows:
    """Read the rows of one source.

    Args:
        path: A local file (.jsonl, .json, .parquet, .csv; gzip'd too), a local folder that holds `<split>.jsonl.gz` or
            the like or one folder a task, `builtin:commonsense`, a known task's name, or a hub dataset.
        name: Subset (configuration) of a hub dataset.
        split: The split; None takes `default_split`.
        task: Known task whose prompt form the rows take; None finds it by the folder or the columns. In a folder of
            task folders it chooses one, known or not.
        limit: Take the first so many rows.
        revision: Commit, tag or branch of a hub dataset.
        default_split: The split where none is given; None means the one to score: the known task's labelled
            evaluation split, else the first of test, validation, heldout that is there.

    Raises:
        UserError: Nothing there, not readable, a malformed row (file and line named), an unknown task or split.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data source {path!r}: expected limit of at least 1, got {limit}")
    local = user_path(path, "data source")
    if path.startswith("builtin:"):
        return _load_builtin(path, split or default_split or "heldout", task, limit)
    if local.is_dir():
        return _load_folder(path, local, split, default_split, task, limit)
    if local.is_file():
        parent = local.resolve().parent.name
        _check_optional_task(task, path)
        return _load_files(path, [local], None, task or (parent if parent in TASKS else None), limit)
    if _looks_local(path):
        raise UserError(f"data source {path!r}: no such file or folder; {_nearest_sibling(local)}")
    _check_optional_task(task, path)
    known = TASKS.get(path) or TASKS.get(task or "") or _task_of_hub_dataset(path, name)
    # the hub has names without a slash too, so only what is as good as a task's name is taken for it misspelt
    if known is None and "/" not in path and (near := _nearest(path, TASKS, cutoff=0.85)):
        raise UserError(f"data source {path!r}: no task of that name, and no file or folder here; {near}")
    hub, subset = (known.hub, name or known.subset) if known and path == known.name else (path, name)
    chosen = split or default_split or (known.eval_split if known else None)
    return _load_hub(path, hub, subset, chosen, task or (known.name if known else None), limit, revision)


def _check_optional_task(task: str | None, path: str) -> None:
    if task is not None:
        check_task(task, f"data source {path!r}, task")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or path.endswith(SUFFIXES)


def _nearest_sibling(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist either (paths are relative to {str(Path.cwd())!r})"
    return (
        _nearest(path.name, [entry.name for entry in folder.iterdir()]) or f"{str(folder)!r} is there; check the name"
    )


def _nearest(name: str, options: Iterable[str], cutoff: float = 0.5) -> str:
    """`did_you_mean`, but nothing at all where no option is near (folders and the hub hold too many names to list)."""
    suggestion = did_you_mean(name, options, cutoff=cutoff)
    return suggestion if suggestion.startswith("did you mean") else ""


def _task_of_hub_dataset(path: str, name: str | None) -> Task | None:
    fitting = [task for task in TASKS.values() if task.hub == path and task.subset in (None, name)]
    return fitting[0] if fitting else None


def _load_builtin(path: str, split: str, task: str | None, limit: int | None) -> Rows:
    if path != BUILTIN:
        raise UserError(f"data source {path!r}: {did_you_mean(path, [BUILTIN])}")
    if split not in ("train", "heldout"):
        raise UserError(f"data source {path!r}: expected the split 'train' or 'heldout', got {split!r}")
    from lsr_scale.data import facts

    rows = [dict(row) for row in facts.rows(split)]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    taken = rows[:limit]
    return Rows(taken, task, Provenance(path, path, None, split, None, digest, len(taken)))


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), None)


def _files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """Map each split to its files: `<split>.<suffix>`, or `<split>-00000-of-00002.parquet` and so on, also in data/."""
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            suffix = _suffix(file)
            if suffix and file.is_file():
                stem = file.name.removesuffix(suffix)
                split, _, shard = stem.partition("-")
                splits.setdefault(split if "-of-" in shard else stem, []).append(file)
    return splits


def _load_folder(
    path: str, folder: Path, split: str | None, default_split: str | None, task: str | None, limit: int | None
) -> Rows:
    if task and not _files_of_folder(folder):
        if not (folder / task).is_dir():
            inside = [entry.name for entry in folder.iterdir() if entry.is_dir()]
            raise UserError(
                f"data source {path!r}: no folder for the task {task!r} there; {did_you_mean(task, inside)}"
            )
        folder = folder / task
    own_name = folder.resolve().name
    if task is not None and task != own_name:
        _check_optional_task(task, path)
    splits = _files_of_folder(folder)
    if not splits:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _files_of_folder(entry))
        hint = f"put a file named <split>{SUFFIXES[0]} there, or another of {', '.join(SUFFIXES)}"
        if inside:
            hint = f"set task to one of its task folders: {', '.join(inside)}"
        raise UserError(f"data source {path!r}: no data file in {str(folder)!r}; {hint}")
    name = task or (own_name if own_name in TASKS else None)
    chosen = split or default_split
    if chosen is None:
        preferred = ([TASKS[name].eval_split] if name in TASKS else []) + list(EVAL_SPLITS)
        chosen = next((candidate for candidate in preferred if candidate in splits), preferred[0])
    if chosen not in splits:
        there = ", ".join(sorted(splits))
        raise UserError(f"data source {path!r}: no split {chosen!r} in {str(folder)!r}; set split to one of: {there}")
    files = splits[chosen]
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        both = ", ".join(file.name for file in files)
        raise UserError(f"data source {path!r}: the split {chosen!r} is there more than once ({both}); keep one")
    return _load_files(path, files, chosen, name, limit)


def _load_files(path: str, files: list[Path], split: str | None, task: str | None, limit: int | None) -> Rows:
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for file in files:
        if _suffix(file) is None:
            raise UserError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}; rename or convert it")
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            for line, row in islice(_read_file(file, split), None if limit is None else limit - len(rows)):
                rows.append(row)
                lines.append(line)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error}); check that the file is whole") from error
    if not rows:
        raise UserError(f"{files[0]}: no rows in it")
    resolved = str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"
    has_lines = len(files) == 1 and ".jsonl" in files[0].name
    found = Provenance(path, resolved, None, split, digest.hexdigest(), None, len(rows))
    return Rows(rows, task, found, lines if has_lines else None)


def _read_file(file: Path, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row); the number is that of the line in a JSONL file."""
    suffix = _suffix(file) or ""
    if suffix.startswith(".jsonl"):
        with _open_text(file) as stream:
            yield from _json_lines(file, stream)
    elif suffix.startswith(".json"):
        with _open_text(file) as stream:
            yield from _json_rows(file, stream.read(), split)
    elif suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
        except pa.ArrowException as error:
            raise UserError(f"{file}: not a parquet file ({error}); check that the file is whole") from error
        yield from enumerate(table.to_pylist(), 1)
    else:
        import pandas as pd

        try:
            frame = pd.read_csv(file, keep_default_na=False)
        except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise UserError(f"{file}: not a CSV file with a header line ({error}); mend the line") from error
        yield from enumerate(({str(key): value for key, value in row.items()} for row in frame.to_dict("records")), 1)


def _open_text(file: Path) -> TextIO:
    # utf-8-sig reads UTF-8 with and without the mark that some editors put in front.
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def _json_lines(file: Path, stream: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object"
            ) from None
        yield number, _object(row, f"{file}, line {number}")


def _json_rows(file: Path, text: str, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # JSON lines under the wrong ending
            yield from _json_lines(file, text.splitlines())
            return
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}); mend the line") from None
    if isinstance(content, dict) and isinstance(content.get(split or "data"), list):
        content = content[split or "data"]
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list of objects, got {type(content).__name__}; or write one object a line")
    for number, row in enumerate(content, 1):
        yield number, _object(row, f"{file}, row {number}")


def _object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object {{...}}, got {type(row).__name__}")
    return row


def _load_hub(
    path: str, hub: str, name: str | None, split: str | None, task: str | None, limit: int | None, revision: str | None
) -> Rows:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    where = f"data source {path!r}"
    if split is None:
        raise UserError(f"{where}: which split of the hub dataset is to be scored? set split (test, validation, ...)")
    near = _nearest(path, [BUILTIN, *TASKS, *(known.hub for known in TASKS.values())]) if hub == path else ""
    try:
        loaded = datasets.load_dataset(hub, name, split=split, revision=revision)
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{where}: no such local path, and the hub dataset {hub!r} is neither in the local cache nor can it be "
            f"reached ({error}); {near} Connect once (with HF_HUB_OFFLINE unset), or point path to a local file or "
            f"folder, or use {BUILTIN!r}, which comes with the package".replace(";  ", "; ")
        ) from error
    except DatasetNotFoundError as error:
        raise UserError(
            f"{where}: neither a local path nor a readable dataset on the hub; {near} "
            "Check the name; a private or gated dataset needs `hf auth login`".replace(";  ", "; ")
        ) from error
    except (ValueError, RuntimeError, FileNotFoundError) as error:  # unknown subset or split, a loading script
        raise UserError(f"{where}: the hub dataset {hub!r} cannot be loaded: {error}") from error
    taken = loaded.select(range(min(limit, len(loaded)))) if limit else loaded
    rows = [dict(row) for row in taken]
    if not rows:
        raise UserError(f"{where}: the split {split!r} of {hub!r} has no rows")
    found = Provenance(path, f"hub:{hub}", name, split, None, loaded._fingerprint, len(rows))
    return Rows(rows, task, found)
