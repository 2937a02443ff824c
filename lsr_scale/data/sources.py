"""Rows from anywhere: a hub dataset, a local file or folder, the set that comes with the package.

What was read is written down beside the rows (`Provenance`), so that a run folder can say what it was trained on.
"""

import glob
import hashlib
import importlib
import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lsr_scale.data.readers import SUFFIXES, check_regular, label_names, names_of_feature, read_file, suffix
from lsr_scale.data.rows import FilePart, Provenance, Rows
from lsr_scale.data.tasks import TASKS, Task, check_task
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import looks_local, user_path

BUILTIN = "builtin:commonsense"
# by name, the module beside this one whose rows(split) they are, "train" or "heldout"
BUILTINS = {BUILTIN: "commonsense", "builtin:chat": "help_desk", "builtin:intents": "intents"}
# The order in which a folder without a known task is searched for something to score, as lm-eval prefers test.
EVAL_SPLITS = ("test", "validation", "heldout", "dev")
_SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<total>\d+)$")


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
        path: A local file (.jsonl, .json, .csv, .tsv, all gzip'd too, .parquet, .arrow), a local folder that holds
            `<split>.jsonl.gz` or the like, one folder a task, or what `save_to_disk` wrote, one of `BUILTINS`, a
            known task's name, or a hub dataset.
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
    check_is_there(path)
    if path.startswith("builtin:"):
        _refuse_hub_keys(path, name, revision)
        _check_optional_task(task, path)
        return _load_builtin(path, split or default_split or "heldout", task, limit)
    local = _local_path(path)
    if local.exists():
        _refuse_hub_keys(path, name, revision)
    if local.is_dir():
        return _load_folder(path, local, split, default_split, task, limit)
    if local.exists():
        check_regular(local)
        if split is not None and (suffix(local) or "").removesuffix(".gz") != ".json":  # one may hold several
            raise UserError(
                f"data source {path!r}: a file has no splits; remove split ({split!r}), or set path to the folder"
            )
        parent = local.resolve().parent.name
        _check_optional_task(task, path)
        return _load_files(path, [local], split, task or (parent if parent in TASKS else None), limit)
    _check_optional_task(task, path)
    known = TASKS.get(path) or TASKS.get(task or "") or _task_of_hub_dataset(path, name)
    # the hub has names without a slash too, so only what is as good as a task's name is taken for it misspelt
    if known is None and "/" not in path and (near := _nearest(path, TASKS, cutoff=0.85)):
        raise UserError(f"data source {path!r}: no task of that name, and no file or folder here; {near}")
    hub, subset = (known.hub, name or known.subset) if known and path == known.name else (path, name)
    chosen = split or default_split or (known.eval_split if known else None)
    return _load_hub(path, hub, subset, chosen, task or (known.name if known else None), limit, revision)


def check_is_there(path: str) -> None:
    """Raise a UserError where a source's path is that of no file, no folder and no set of the package.

    A name that may be a dataset's of the hub passes.
    """
    if path.startswith("builtin:"):
        if path not in BUILTINS:
            raise UserError(f"data source {path!r}: {did_you_mean(path, BUILTINS)}")
        return
    local = _local_path(path)
    if not local.exists() and _looks_local(path):
        raise UserError(f"data source {path!r}: no such file or folder; {nearest_sibling(local)}")


def _refuse_hub_keys(path: str, name: str | None, revision: str | None) -> None:
    for key, value in (("name", name), ("revision", revision)):
        if value is not None:
            raise UserError(f"data source {path!r}: only a hub dataset has a {key}; remove {key} ({value!r})")


def _check_optional_task(task: str | None, path: str) -> None:
    if task is not None:
        check_task(task, f"data source {path!r}, task")


def _looks_local(path: str) -> bool:
    return looks_local(path) or "\\" in path or suffix(Path(path)) is not None


def _local_path(path: str) -> Path:
    """Return the path that a source's name would be here, there or not.

    Raises:
        UserError: The name can be no path and no dataset.
    """
    local = user_path(path, "data source")
    try:
        local.exists()
    except OSError as error:
        raise UserError(
            f"data source {path[:200]!r}: cannot be looked at ({error.strerror}); check the path"
        ) from error
    return local


def nearest_sibling(path: Path) -> str:
    """Return in words what is near a path that is not there."""
    if glob.has_magic(str(path)):
        return "patterns are not filled in here; list the files, or name a folder of splits"
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
    split = "heldout" if split == "validation" else split  # as a source of data.validation asks for it
    if split not in ("train", "heldout"):
        raise UserError(f"data source {path!r}: expected the split 'train' or 'heldout', got {split!r}")
    embedded = importlib.import_module(f"lsr_scale.data.{BUILTINS[path]}")
    rows = [dict(row) for row in embedded.rows(split)]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    taken = rows[:limit]
    return Rows(taken, task, Provenance(path, path, None, split, None, digest, len(taken)))


def _files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """Map each split to its files.

    They are `<split>.<suffix>`, or `<split>-00000-of-00002.parquet` and so on, also in data/, or what `save_to_disk`
    of a dataset or of several wrote.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _described(folder / "dataset_dict.json", "splits")
        return {name: files for name in names for files in _files_of_folder(folder / name).values()}
    if _is_saved(folder):
        names = _described(folder / "state.json", "_data_files", "filename")
        return {_saved_split(folder): [folder / name for name in names]}
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if suffix(file) and not file.is_dir():
                splits.setdefault(_SHARD.sub("", _stem(file)), []).append(file)
    return splits


def _is_saved(folder: Path) -> bool:
    """Tell whether a folder is one dataset as `save_to_disk` writes it."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_split(folder: Path) -> str:
    try:
        return str(json.loads((folder / "state.json").read_bytes())["_split"] or "train")
    except (ValueError, KeyError, TypeError, RecursionError):
        return "train"


def _described(file: Path, key: str, inner: str | None = None) -> list[str]:
    """Return the names that a description by `save_to_disk` lists; each is that of something in its folder."""
    try:
        listed = json.loads(file.read_bytes())[key]
        names = [item[inner] if inner else item for item in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not written by save_to_disk ({error!r:.100}); save the dataset again") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{file}: {name!r:.60} is no name of something in this folder; save the dataset again")
        if not (file.parent / name).exists():
            raise UserError(f"{file}: {name[:60]!r} is not there; copy the whole folder, or save the dataset again")
    return names


def _check_shards(path: str, split: str, files: list[Path]) -> None:
    """Raise unless the files of a split are one, or all the shards of one set."""
    shards = [match for file in files if (match := _SHARD.search(_stem(file)))]
    if len(files) == 1 and not shards:
        return
    where = f"data source {path!r}: the split {split!r}"
    numbers = {int(shard["number"]) for shard in shards}
    if len(numbers) < len(files) or len({shard["total"] for shard in shards}) > 1:
        both = ", ".join(file.name for file in files[:8])
        raise UserError(f"{where} is there more than once ({both}); keep one")
    total = int(shards[0]["total"])
    if missing := list(islice((number for number in range(total) if number not in numbers), 8)):
        listed = ", ".join(f"{number:05}" for number in missing) + (", ..." if len(missing) == 8 else "")
        raise UserError(
            f"{where} has {len(files)} of {total} shards, without {listed}; fetch the others, or set path to one file, "
            f"such as {str(files[0])!r}"
        )


def _stem(file: Path) -> str:
    return file.name[: -len(suffix(file) or " ")]


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
    if split is None and _is_saved(folder):  # one dataset, of whatever split
        (chosen,) = splits
    elif chosen is None:
        preferred = ([TASKS[name].eval_split] if name in TASKS else []) + list(EVAL_SPLITS)
        chosen = next((candidate for candidate in preferred if candidate in splits), preferred[0])
    if chosen not in splits:
        there = ", ".join(sorted(splits))
        raise UserError(
            f"data source {path!r}: no split {chosen!r} in {str(folder)!r}; set split to one of: {there}; or list the "
            "files"
        )
    files = splits[chosen]
    _check_shards(path, chosen, files)
    return _load_files(path, files, chosen, name, limit)


def _load_files(path: str, files: list[Path], split: str | None, task: str | None, limit: int | None) -> Rows:
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    parts = [FilePart(file, []) for file in files]
    for file, part in zip(files, parts, strict=True):
        for number, row in islice(read_file(file, split), None if limit is None else limit - len(rows)):
            rows.append(row)
            part.numbers.append(number)
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error}); check that the file is whole") from error
    if not rows:
        raise UserError(f"{files[0]}: no rows in it; a file has at least one")
    resolved = str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"
    provenance = Provenance(path, resolved, None, split, digest.hexdigest(), None, len(rows))
    return Rows(rows, task, provenance, tuple(parts), label_names(files[0]))


def _load_hub(
    path: str, hub: str, name: str | None, split: str | None, task: str | None, limit: int | None, revision: str | None
) -> Rows:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    where = f"data source {path!r}"
    if split is None:
        raise UserError(f"{where}: which split of the hub dataset is to be scored? set split (test, validation, ...)")
    near = _nearest(path, [*BUILTINS, *TASKS, *(known.hub for known in TASKS.values())]) if hub == path else ""
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
    except (
        ValueError,
        RuntimeError,
        FileNotFoundError,
        DatasetsError,
    ) as error:  # unknown subset or split, a loading script
        raise UserError(f"{where}: the hub dataset {hub!r} cannot be loaded: {error}") from error
    taken = loaded.select(range(min(limit, len(loaded)))) if limit else loaded
    rows = [dict(row) for row in taken]
    if not rows:
        raise UserError(f"{where}: the split {split!r} of {hub!r} has no rows")
    provenance = Provenance(path, f"hub:{hub}", name, split, None, loaded._fingerprint, len(rows))
    return Rows(rows, task, provenance, label_names=names_of_feature(loaded.features))
