"""From what a user wrote to a path, and telling a plain file from a pipe or a device before it is opened."""

import os
from pathlib import Path

from lsr_scale.errors import UserError


def user_path(text: str | Path, where: str = "") -> Path:
    """Return the path that a user wrote, `~` and `~user` filled in.

    Args:
        text: The path.
        where: What asked for it, such as "training.output_dir", for the message.

    Raises:
        UserError: if no file can have this name: it is empty, holds a NUL or half a surrogate pair, or nobody has this
            home.
    """
    before = f"{where}: " if where else ""
    if not str(text) or str(text).isspace():
        raise UserError(f"{before}expected a path, got {str(text)!r}; for the folder that you are in: .")
    try:
        named = os.fsencode(text)
    except UnicodeEncodeError:
        named = b"\0"
    if b"\0" in named:
        raise UserError(f"{before}{str(text)[:80]!r}: no file can have this name; write it without special characters")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        home = Path(text).parts[0]
        raise UserError(
            f"{before}{str(text)[:80]!r}: there is no home folder for {home!r} here; write the whole path"
        ) from None


def is_odd(path: Path) -> bool:
    """Tell whether something lies here that is no file and no folder: a pipe, a socket or a device; never opens it."""
    return path.exists() and not path.is_file() and not path.is_dir()
