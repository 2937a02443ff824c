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

MIN_ROWS = 5_000  # fewer are tokenized in a second
MIN_FREE = 20  # times the rows' size: on a fuller disk nothing is cached
DAYS_UNUSED = 30  # after which a dataset is removed


def cached(dataset: "Dataset") -> "Dataset":
    """Return a dataset as it lies in the cache folder, put there if it is not; the same where that cannot be.

    Args:
        dataset: In memory. Small ones are returned as they are.
    """
    from datasets import load_from_disk

    if len(dataset) < MIN_ROWS:
        return dataset
    try:
        folder = cache_folder() / "datasets" / digest(dataset)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder.parent).free < MIN_FREE * dataset.data.nbytes:
                return dataset
            # nobody else's, on no other node either, where the folder is shared
            temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            dataset.save_to_disk(temporary)
            try:
                temporary.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(temporary, ignore_errors=True)
        os.utime(folder)
        _remove_unused(folder.parent)
        return load_from_disk(str(folder))  # pyright: ignore[reportReturnType]
    except (OSError, ValueError):  # read-only, full, or damaged: nothing but time is lost
        return dataset


def digest(dataset: "Dataset") -> str:
    """Return a digest of a dataset's columns and rows."""
    sha256 = hashlib.sha256(str(dataset.features).encode())
    for batch in dataset.data.to_batches():
        for column in batch.columns:
            sha256.update(str(len(column)).encode())
            for buffer in column.buffers():
                sha256.update(b"-" if buffer is None else memoryview(buffer))
    return sha256.hexdigest()[:32]


def _remove_unused(folder: Path) -> None:
    """Remove datasets that no run used for a month."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process renamed its temporary folder
            if time.time() - path.stat().st_mtime > DAYS_UNUSED * 86_400:
                shutil.rmtree(path, ignore_errors=True)
