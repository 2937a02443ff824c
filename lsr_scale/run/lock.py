"""The lock that keeps a run folder to one run at a time: `.lock` in it, which says who holds it."""

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lsr_scale.errors import UserError

_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK)  # a link, a folder, a socket


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes' runs out of a folder.

    The system frees the lock when the process ends, killed or not; a loader's workers do not hold it.

    Raises:
        UserError: if a run is under way here, or something else lies where its lock belongs.
    """
    file = folder / ".lock"

    def sign(handle: int) -> None:
        _holder(handle, file)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    lock = FileLock(file, blocking=False, on_acquired=sign)
    _acquire(lock, file)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)  # while it is ours
            lock.release()


def _acquire(lock: FileLock, file: Path) -> None:
    """Take a lock; on some network storage, which has none, do without."""
    while True:
        try:
            lock.acquire()
            return
        except Timeout:
            with contextlib.suppress(FileNotFoundError):  # its holder removed it just now: again
                raise UserError(
                    f"{file.parent}: a run is under way here ({_holder(file, file) or 'it began just now'}); wait for "
                    "its end, or go elsewhere with --set training.output_dir=..."
                ) from None
        except OSError as error:
            if error.errno in _NO_FILE:
                raise _no_lock(file) from None
            return


def _holder(file: int | Path, name: Path) -> str:
    """Return what a lock file says of the process that holds it, or held it when it was killed; "" for a new one.

    Raises:
        UserError: if it is no lock file.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise _no_lock(name)
    with open(file, "rb", closefd=isinstance(file, Path)) as stream:
        content = stream.read(200).decode("utf-8", "replace")
    if content and not re.fullmatch(r"process [0-9]+ on .*\n?", content):
        raise _no_lock(name)
    return content.strip()


def _no_lock(file: Path) -> UserError:
    return UserError(f"{file}: a run's lock belongs here, but this is none; move it away")
