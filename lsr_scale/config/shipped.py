"""Which file a user means by CONFIG: one of theirs, or by its name one of those that come with the package."""

import difflib
from pathlib import Path

from lsr_scale.errors import UserError, nearest
from lsr_scale.paths import user_path

# in a checkout a link to the configs/ that stands beside the package, in a wheel a folder of its own
FOLDER = Path(__file__).parent.parent / "configs"


def shipped() -> dict[str, Path]:
    """Return the runs that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_run(text: str | Path) -> Path:
    """Return the file of a run: a local one, else the shipped one of that name.

    Args:
        text: A path, or a name such as `mistral_lsr`, whose local `mistral_lsr.yaml` goes first. `configs/NAME.yaml`,
            as a checkout has it, is the shipped one where there is no folder configs.

    Raises:
        UserError: if there is neither, with what is near it, else with all there is.
    """
    path = user_path(text)
    if path.exists() and not path.is_dir():
        return path
    is_name = str(text) == path.name and path.suffix in ("", ".yaml", ".yml")
    if is_name and not path.suffix and (local := path.with_name(f"{path.name}.yaml")).is_file():
        return local
    in_checkout = path.parts[:-1] == ("configs",) and path.suffix == ".yaml" and not path.parent.exists()
    if (is_name or in_checkout) and path.stem in (known := shipped()):
        return known[path.stem]
    wanted, folder = (path / path.name, path) if path.is_dir() else (path, path.parent)
    what = "expected a file, got a folder" if path.is_dir() else "no such file"
    raise UserError(f"{path}: {what}; {_what_there_is(wanted.stem, folder)}")


def _what_there_is(name: str, folder: Path) -> str:
    """Return the files and names that could have been meant: those that are near, else all."""
    local = {
        path.stem: str(path)
        for near in (folder, folder / "configs")
        for pattern in ("*.yaml", "*.yml")
        for path in sorted(near.glob(pattern))
    }
    names = list(dict.fromkeys([*local, *shipped()]))
    if near := nearest(name, names, cutoff=0.6):
        return f"did you mean {' or '.join(local.get(other, other) for other in near)}?"
    names.sort(key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    files = [local[other] for other in names if other in local]
    there = (
        f"files: {', '.join(files[:8])}{', ...' if len(files) > 8 else ''}" if files else f"no YAML files in {folder}/"
    )
    by_name = [other for other in names if other not in local]
    ours = f"; by name, with the package: {', '.join(by_name)}" if by_name else ""
    return f"there are {there}{ours}"
