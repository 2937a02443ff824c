"""What a run leaves on disk and how: files appear whole or not at all, and say what they were made with."""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from lsr_scale.errors import UserError

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets", "tokenizers"),
    *("safetensors", "triton"),
)


_UMASK = os.umask(0)
os.umask(_UMASK)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside and move it into place, so that a full disk or a kill leaves the old one as it was.

    Raises:
        UserError: if the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the words for a failed write: what is wrong, and what to do about that."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = (
        "free some space (or raise the limit), then repeat the command, a training run with --resume auto"
        if full
        else "check the path and who may write there"
    )
    return UserError(f"{path}: cannot be written: {error.strerror or error}; {remedy}")


def system_error(error: Exception) -> OSError | None:
    """Return the system's error, also behind one of a library that has it as text (safetensors), or None."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\bos error (\d+)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if "No space left" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def sync(path: Path) -> None:
    """See a file's content, or the names in a folder, onto the disk; some network storage cannot do the latter."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def share(folder: Path) -> None:
    """Let a folder's files be read by whom the umask lets: safetensors writes them for their owner alone."""
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
        UserError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {what} here") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({error}); restore it or make it again") from error


def environment() -> dict[str, Any]:
    """Return what a result depends on: versions, machine, and this package's commit where it is run from a checkout."""
    import torch

    import lsr_scale

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "lsr_scale": lsr_scale.__version__,
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
