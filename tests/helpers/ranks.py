"""Two processes that train together, forked off one that has imported the libraries, which takes each of them seconds.

What a launcher itself does is tested with `launch`. This module imports nothing but the standard library.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from tests.helpers.ports import held_port
from tests.helpers.programs import LIBRARIES

COMMAND = "lsr_scale.launch"


class Rank:
    """A process that does a module's `main`, with some of `subprocess.Popen`'s attributes.

    Args:
        words: The module's name and its command line.
        variables: Of its environment, beside those that are here.
    """

    def __init__(self, words: Sequence[object], variables: dict[str, object]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self.process = context.Process(target=_do, args=([*map(str, words)], environment, *map(str, self._files)))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and to stderr."""
        self.process.join()
        out, err = (file.read_text() for file in self._files)
        return out, err


def run_ranks(module: str, *arguments: object) -> tuple[int, str, str]:
    """Have two processes do a module's `main`, with the variables that torchrun sets; where one fails, end the other.

    However long it takes: what hangs is ended by pytest's own limit.

    Returns:
        0, or the status of the first that failed; what both wrote to stdout, and to stderr.
    """
    with held_port() as port:
        meeting = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        meeting |= {"OMP_NUM_THREADS": 1}
        ranks = [Rank([module, *arguments], {**meeting, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)]
        status, running = 0, list(ranks)
        while running:
            wait([rank.process.sentinel for rank in running])
            for rank in [rank for rank in running if rank.poll() is not None]:
                running.remove(rank)
                if rank.returncode and not status:
                    status = rank.returncode
                    for other in running:
                        other.terminate()
        said = [rank.communicate() for rank in ranks]
    out, err = ("\n".join(parts) for parts in zip(*said, strict=True))
    return status, out, err


def _do(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = words
    status = importlib.import_module(words[0]).main()
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none ends while another is in its last exchange
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
