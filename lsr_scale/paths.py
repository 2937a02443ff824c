"""From what a user wrote to a path, and telling a plain file from a pipe or a device before it is opened."""

import os
import re
from pathlib import Path

from lsr_scale.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|dbfs:/")
_VARIABLE = re.compile(r"\$\w+|\$\{[^}]*\}?|\$\([^)]*\)?|`[^`]*`|%\w+%")


def user_path(text: str | Path, where: str = "") -> Path:
    """Return the path that a user wrote, `~` and `~user` filled in.

    Args:
        text: The path.
        where: What asked for it, such as "training.output_dir", for the message.

    Raises:
        UserError: if it is none: nothing, an address, with control characters or half a surrogate pair, with a shell's
            variable that no shell filled in, in a home that nobody has, or at or beyond a link that leads nowhere.
    """
    before = f"{where}: " if where else ""
    if not str(text) or str(text).isspace():
        raise UserError(f"{before}expected a path, got {str(text)!r}; for the folder that you are in: .")
    shown = f"{before}{str(text)!r}"
    try:
        named = os.fsencode(text)
    except UnicodeEncodeError:
        named = b"\0"
    if any(byte < 32 or byte == 127 for byte in named):
        raise UserError(f"{shown}: no file can have this name; write it without special characters")
    if _ADDRESS.match(str(text)):
        raise UserError(f"{shown}: an address, where a path on this machine is expected; copy it here, and name that")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{shown}: there is no home folder for {Path(text).parts[0]!r} here; write the whole path"
        ) from None
    if (variable := _VARIABLE.search(str(text))) and not path.exists():
        raise UserError(
            f"{shown}: {variable[0]!r} stands there as it is: only a shell fills in variables, outside single quotes "
            "and outside files; write the whole path"
        )
    for link in (path, *path.parents):
        if os.path.islink(link) and not os.path.exists(link):  # these take names of any length, and loops
            whose = "a link" if link == path else f"{str(link)!r} is a link"
            raise UserError(f"{shown}: {whose} to {os.readlink(link)!r}, which leads nowhere; mend it, or name another")
    return path


def looks_local(name: str) -> bool:
    """Tell whether a name can be none of the hub, which has one slash or none."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def is_special_file(path: Path) -> bool:
    """Tell whether something lies here that is no file and no folder: a pipe, a socket or a device; never opens it."""
    return path.exists() and not path.is_file() and not path.is_dir()
