"""Whether a run or an adapter lies where a command is pointed to: told before torch is imported."""

from pathlib import Path

from lsr_scale.errors import UserError
from lsr_scale.paths import user_path


def find_run(path: str | Path) -> Path:
    """Return the folder of an existing run.

    Raises:
        UserError: if there is none.
    """
    folder = user_path(path)
    if not (folder / "config.yaml").is_file():
        if (folder / "adapter_config.json").is_file():
            parent = folder.resolve().parent
            instead = (
                f"name the run's: {parent}" if (parent / "config.yaml").is_file() else "no run's folder is around it"
            )
            raise UserError(f"{path}: an adapter's folder, where a run's is expected; {instead}")
        runs = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        known = f"; runs here: {', '.join(f'runs/{name}' for name in runs[:8])}" if runs else ""
        raise UserError(f"{path}: not a run folder (there is no config.yaml in it){known}")
    return folder


def find_adapter(path: str | Path) -> Path:
    """Return the adapter's folder in a run's folder, or the adapter's folder itself.

    Raises:
        UserError: if there is none.
    """
    folder = user_path(path)
    if (folder / "config.yaml").is_file():
        folder = folder / "adapter"
        if not folder.is_dir():
            raise UserError(f"{path}: the run has no adapter yet; train it, or resume it with --resume auto")
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: there is no adapter in this folder (adapter_config.json is missing)")
    return folder
