"""Files on disk: written atomically (complete or not at all), and what a result was made with (`environment`)."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil

from lsr_scale.errors import UserError
from lsr_scale.paths import is_special_file
from lsr_scale.version import __version__

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets", "tokenizers"),
    *("safetensors", "triton"),
)


MAX_JSON_BYTES = 16 * 2**20  # of what describes an adapter or a run: none comes near
# what a picture says of who drew it
PICTURE_METADATA = {"Software": "lsr_scale"}

# what `temporary_path` makes of a name, and what libraries put after that
_TEMPORARY = re.compile(r"\.(.+)\.([0-9]{1,9})(?:\.h([0-9a-f]{8}))?\.part(\..+)?")
# numbers of processes are a host's own, and storage may be shared by several; a container's host name is its own too
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# after which what another host's process writes, if it still does, is taken for left over
_OTHER_HOSTS_S = 24 * 3600.0

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that a full disk or a kill leaves the old one as it was.

    Raises:
        UserError: if the file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def temporary_path(path: Path) -> Path:
    """Return where this process writes what becomes `path`, a file or a folder, once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.h{_HOST}.part")


def remove_stale_temporaries(path: Path) -> None:
    """Remove the `temporary_path` of a path, and what begins with its name, of processes that have ended."""
    remove_left_over(path.parent, lambda name: name == path.name)


def remove_left_over(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove every `temporary_path` in a folder that a process left which has ended, as by a kill; no other file.

    Whether another host's process has ended is not known: what it left goes a day after the last write to it.

    Args:
        folder: Where to look; it need not exist.
        is_ours: Tells by its name whether a file or folder is one of those that are written here.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None or not is_ours(match[1]):
            continue
        if match[3] in (None, _HOST):  # of earlier releases: no host
            has_ended = int(match[2]) == os.getpid() or not psutil.pid_exists(int(match[2]))
        else:
            has_ended = time.time() - _last_write(entry) > _OTHER_HOSTS_S
        if has_ended:
            remove(entry)


def _last_write(path: Path) -> float:
    """Return when a file, or anything in a folder, was last written to."""
    found = [time.time()]
    with contextlib.suppress(OSError):  # it may go meanwhile
        found = [entry.lstat().st_mtime for entry in (path, *path.rglob("*"))]
    return max(found)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder with all that is in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def replace_folder(aside: Path, target: Path, written: Collection[str]) -> None:
    """Move a folder into another's place, of which only the files named in `written` go; what else it has stays."""
    old = target.with_name(f".{target.name}.old")
    finish_replacing(target)
    if os.path.lexists(target):
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    if old.is_dir() and not old.is_symlink():
        for path in old.iterdir():
            if path.name not in written and not os.path.lexists(target / path.name):
                path.rename(target / path.name)
    remove(old)


def finish_replacing(target: Path) -> None:
    """Restore what a kill in the middle of `replace_folder` left under another name, and remove what is left over."""
    old = target.with_name(f".{target.name}.old")
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
    elif os.path.lexists(old):
        remove(old)


def is_picture(file: Path) -> bool:
    """Tell whether a file is a PNG."""
    return _first_bytes(file).startswith(b"\x89PNG\r\n")


def is_own_picture(file: Path) -> bool:
    """Tell whether a file is a PNG that this package drew (`PICTURE_METADATA`)."""
    return is_picture(file) and b"tEXtSoftware\0lsr_scale" in _first_bytes(file)


def is_own_page(file: Path) -> bool:
    """Tell whether a file is an HTML page that this package wrote."""
    return b'<meta name="generator" content="lsr_scale">' in _first_bytes(file)


def _first_bytes(file: Path) -> bytes:
    if not file.is_file():
        return b""
    with file.open("rb") as stream:
        return stream.read(512)


def cannot_write(path: Path, error: Exception) -> UserError:
    """Return the words for a failed write, of a library too: what is wrong, and what to do about that."""
    system = system_error(error) or OSError(str(error))
    full = system.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = (
        "free some space (or raise the limit), then repeat the command, a training run with --resume auto"
        if full
        else "check the path and who may write there"
    )
    return UserError(f"{path}: cannot be written: {system.strerror or system}; {remedy}")


def system_error(error: Exception) -> OSError | None:
    """Return the system's error, also behind one of a library that has it as text (safetensors), or None."""
    if isinstance(error, OSError):
        return error
    if match := re.search(r"\bos error (\d+)", str(error)):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    if "No space left" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def fsync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk; some network storage cannot do the latter."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def apply_umask(folder: Path) -> None:
    """Give a folder's files the permissions of the umask: safetensors writes them for their owner alone."""
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        what: What it is, for the message.

    Raises:
        UserError: if it is missing, larger than `MAX_JSON_BYTES` or not JSON.
    """
    if is_special_file(path):
        raise UserError(f"{path}: the {what} should be a file, but is a pipe or a device; restore it or make it again")
    if path.is_file() and (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(f"{path}: {size:,} bytes are no {what}; restore it or make it again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {what} here") from None
    except RecursionError:
        raise UserError(f"{path}: the {what} is nested too deeply; restore it or make it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({error}); restore it or make it again") from error


def environment() -> dict[str, Any]:
    """Return what a result depends on: versions, machine, and this package's commit where it is run from a checkout."""
    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "lsr_scale": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,  # pyright: ignore[reportAttributeAccessIssue]
        "gpus": gpus,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package lies in, with "+changes" where it has uncommitted ones."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
