"""Whether a run or an adapter lies where a command is pointed to: told before torch is imported."""

import re
import shlex
from pathlib import Path

from lsr_scale.errors import UserError
from lsr_scale.paths import user_path

CHECKPOINT = re.compile("checkpoint-[0-9]{1,18}")


def find_run(path: str | Path) -> Path:
    """Return the folder of an existing run.

    Raises:
        UserError: if there is none.
    """
    folder = user_path(path)
    if not (folder / "config.yaml").is_file():
        _refuse_sweep(path, folder)
        if (folder / "adapter_config.json").is_file():
            parent = folder.resolve().parent
            instead = (
                f"name the run's: {parent}"
                if (parent / "config.yaml").is_file()
                else f"no run's folder is around it; lsr-scale export {shlex.quote(str(path))} --to merged --out "
                "FOLDER makes a model of it, which lsr-scale generate --model FOLDER takes"
            )
            raise UserError(f"{path}: an adapter's folder, where a run's is expected; {instead}")
        runs = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        known = f"; runs here: {', '.join(f'runs/{name}' for name in runs[:8])}" if runs else ""
        raise UserError(f"{path}: not a run folder (there is no config.yaml in it){known}")
    return folder


def _refuse_sweep(path: str | Path, folder: Path) -> None:
    """Raise a UserError for the folder of a sweep, which names the folders of its trials."""
    if (folder / "sweep.json").is_file():
        trials = sorted(str(file.parent) for file in folder.glob("trials/*/config.yaml"))
        named = f"name one of its trials: {', '.join(trials[:8])}" if trials else "none of its trials has begun"
        table = f"; the best one is named in {folder / 'sweep.md'}" if (folder / "sweep.md").is_file() else ""
        raise UserError(f"{path}: a sweep's folder, where a run's is expected; {named}{table}")


def find_trained(path: str | Path) -> tuple[Path, Path | None]:
    """Return a run's folder, and the checkpoint in it where that is what the path names.

    Raises:
        UserError: if there is no run.
    """
    checkpoint = _checkpoint(path)
    return (find_run(path), None) if checkpoint is None else (checkpoint.parent, checkpoint)


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether a path is that of a run's checkpoint."""
    return _checkpoint(path) is not None


def _checkpoint(path: str | Path) -> Path | None:
    folder = user_path(path)
    if not CHECKPOINT.fullmatch(folder.name):
        folder = folder.resolve()  # "." and links
    is_adapter = CHECKPOINT.fullmatch(folder.name) and (folder / "adapter_config.json").is_file()
    return folder if is_adapter and (folder.parent / "config.yaml").is_file() else None


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last of a run's checkpoints that has an adapter, None where there is none."""
    names = (path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name))
    with_adapter = (path for path in names if (path / "adapter_config.json").is_file())
    return max(with_adapter, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def find_adapter(path: str | Path) -> Path:
    """Return the adapter's folder in a run's folder, or the adapter's folder itself.

    Raises:
        UserError: if there is none.
    """
    folder = user_path(path)
    if (folder / "config.yaml").is_file():
        folder = folder / "adapter"
        if not folder.is_dir():
            newest = newest_checkpoint(folder.parent)
            instead = f"; or name its newest checkpoint: {newest}" if newest else ""
            raise UserError(f"{path}: the run has no adapter yet; train it, or resume it with --resume auto{instead}")
    if not (folder / "adapter_config.json").is_file():
        _refuse_sweep(path, folder)
        raise UserError(f"{folder}: there is no adapter in this folder (adapter_config.json is missing)")
    return folder
