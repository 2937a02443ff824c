"""Making room for checkpoints: old ones beyond `save_total_limit` are removed, what has a new one's name is renamed."""

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from lsr_scale import files
from lsr_scale.adapters.card import CARD_NAME
from lsr_scale.run.folder import MANIFEST, RunFolder, is_own_checkpoint, step_of
from lsr_scale.training.checkpoint.manifest import NEEDED, is_misnamed


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint's files; what else somebody put there stays."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    names = {MANIFEST, CARD_NAME, *NEEDED}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        names |= set(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    for name in names:
        if Path(name).name == name:  # nothing outside of it
            files.remove(checkpoint / name)
    with contextlib.suppress(OSError):
        checkpoint.rmdir()


def rotate(folder: RunFolder, limit: int | None, keep: Collection[int]) -> None:
    """Remove the oldest checkpoints beyond a limit, by their steps.

    Args:
        folder: The run's.
        limit: `training.save_total_limit`; None removes nothing.
        keep: Steps that stay, such as the best and the last: as many stay at least.
    """
    if limit is None or limit < 1:
        return
    saved = [path for path in folder.own_checkpoints() if not is_misnamed(path)]
    for path in [path for path in saved if step_of(path) not in keep][: max(0, len(saved) - limit)]:
        remove(path)


def rename_other(checkpoint: Path) -> Path | None:
    """Rename what has a new checkpoint's name and is none of that step; return its new path, None if there is none."""
    if not os.path.lexists(checkpoint) or (is_own_checkpoint(checkpoint) and not is_misnamed(checkpoint)):
        return None
    names = (f"{checkpoint.name}.kept", *(f"{checkpoint.name}.kept-{number}" for number in range(2, 1000)))
    target = next(path for name in names if not os.path.lexists(path := checkpoint.with_name(name)))
    return checkpoint.rename(target)
