"""Datasets in the cache folder, so that what is made of them, tokens above all, is made once and not in every run.

<cache>/datasets/<digest of the rows>/    as `Dataset.save_to_disk` writes it; `Dataset.map` keeps its results beside
"""

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from lsr_scale.model.builtin import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

FEWEST_ROWS = 5_000  # fewer are tokenized in a second
FREE_TIMES = 20  # a disk is left alone unless it has so many times the rows' size free
DAYS_KEPT = 30


def kept(dataset: "Dataset") -> "Dataset":
    """Return a dataset as it lies in the cache folder, put there if it is not; the same where that cannot be.

    Args:
        dataset: In memory. Small ones are returned as they are.
    """
    from datasets import load_from_disk

    if len(dataset) < FEWEST_ROWS:
        return dataset
    try:
        folder = cache_folder() / "datasets" / digest(dataset)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder.parent).free < FREE_TIMES * dataset.data.nbytes:
                return dataset
            # nobody else's, on no other node either, where the folder is shared
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            dataset.save_to_disk(aside)
            try:
                aside.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(aside, ignore_errors=True)
        os.utime(folder)
        _forget_old(folder.parent)
        return load_from_disk(str(folder))  # pyright: ignore[reportReturnType]
    except (OSError, ValueError):  # read-only, full, or damaged: nothing but time is lost
        return dataset


def digest(dataset: "Dataset") -> str:
    """Return a digest of a dataset's columns and rows."""
    found = hashlib.sha256(str(dataset.features).encode())
    for batch in dataset.data.to_batches():
        for column in batch.columns:
            found.update(str(len(column)).encode())
            for buffer in column.buffers():
                found.update(b"-" if buffer is None else memoryview(buffer))
    return found.hexdigest()[:32]


def _forget_old(folder: Path) -> None:
    """Remove what nobody used for a month."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process moved into place what it had written aside
            if time.time() - path.stat().st_mtime > DAYS_KEPT * 86_400:
                shutil.rmtree(path, ignore_errors=True)
