"""Processes that a benchmark starts, and ends with all that they have started."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import threading

import psutil

ENDS_S = 60.0  # that the system may take to free what a killed process held, a GPU's memory above all


def end_with_parent() -> None:
    """Have this process end when the one that started it by multiprocessing is gone, whatever either is busy with.

    A killed benchmark's processes would keep the GPU else.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill a process and what it has started, if it is there, and wait until none of them is.

    By torchrun's number alone it would end without its workers, which are in sessions of their own. Until they too have
    ended, they hold the lock of their run's folder.
    """
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    started = parent.children(recursive=True)
    for one in (parent, *started):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=ENDS_S)
