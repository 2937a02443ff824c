"""Processes that train, forked off one that has imported the libraries, which takes a fresh one seconds (`programs`).

What a launcher itself does is tested with `launch`. This module imports nothing but the standard library.
"""

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from tests.helpers.once import do_once
from tests.helpers.ports import held_port
from tests.helpers.programs import one_thread, with_libraries

COMMAND = "lsr_scale.launch"
_POPEN = subprocess.Popen


class Rank:
    """A process that does what `python -m MODULE ...` does, with the most of `subprocess.Popen`'s attributes.

    Args:
        words: The module's name and its command line.
        variables: Of its environment, beside those that are here.
        stdout: The file that takes what it writes; by default one that `communicate` reads.
        stderr: Likewise.
        start_new_session: It leads a session and a process group of its own.
    """

    def __init__(
        self,
        words: Sequence[object],
        variables: Mapping[str, object],
        stdout: Path | None = None,
        stderr: Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [given or Path(self._folder.name) / name for name, given in (("out", stdout), ("err", stderr))]
        for file in self._files:
            file.touch()
        self.args = [*map(str, words)]
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        files = [str(file) for file in self._files]
        self.process = with_libraries().Process(target=_do, args=(self.args, environment, *files, start_new_session))
        self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.join()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit status."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and to stderr."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class Ranks:
    """Processes that torchrun would start, with what `subprocess.Popen`'s users ask of the launcher."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        from torch.distributed.run import parse_args

        given = parse_args(words)  # which ends this process where torchrun does not take them
        assert given.standalone
        assert given.training_script.endswith("launch/train.py")
        number = int(given.nproc_per_node)
        self._port = contextlib.ExitStack()
        meeting = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        meeting |= {**env, "MASTER_PORT": self._port.enter_context(held_port())}
        self._ranks = [
            Rank([COMMAND, *given.training_script_args], {**meeting, "RANK": rank, "LOCAL_RANK": rank}, **options)
            for rank in range(number)
        ]
        self.pid = self._ranks[0].pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.process.join()
        self._port.close()

    @property
    def returncode(self) -> int | None:
        """0 where all ended well."""
        return next((rank.returncode for rank in self._ranks if rank.returncode != 0), 0)

    def poll(self) -> int | None:
        """Return the exit status, None while they run."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end of all; return the exit status."""
        for rank in self._ranks:
            rank.wait(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of all; return what they wrote to stdout and to stderr."""
        said = [rank.communicate(timeout) for rank in self._ranks]
        return "".join(out for out, _ in said), "".join(err for _, err in said)


def popen(words: Sequence[str], stdout: Any = None, stderr: Any = None, env: Any = None, **options: Any) -> Any:
    """Stand in for `subprocess.Popen`: what runs this package by itself is a `Rank`, by torchrun one or more.

    The rest is what it is.

    Of the environment what is set is taken, not what is left out.
    """
    if words[:3] == [sys.executable, "-m", "torch.distributed.run"]:
        return Ranks(words[3:], env or {}, start_new_session=options.get("start_new_session", False))
    command = [COMMAND, *words[2:]] if words[1].endswith("launch/train.py") else words[2:]
    if words[0] != sys.executable or command[0] not in (COMMAND, "lsr_scale"):
        return _POPEN(words, stdout=stdout, stderr=stderr, env=env, **options)
    options.pop("text", None)
    files = [Path(os.devnull) if file == subprocess.DEVNULL else file for file in (stdout, stderr)]
    if stderr == subprocess.STDOUT:
        files[1] = files[0]
    out, err = (None if file in (None, subprocess.PIPE) else Path(getattr(file, "name", file)) for file in files)
    return Rank(command, env or {}, stdout=out, stderr=err, **options)


def run_ranks(module: str, *arguments: object, number: int = 2) -> tuple[int, str, str]:
    """Have so many processes do a module's `main`, with what torchrun sets; where one fails, end the others.

    However long it takes: what hangs is ended by pytest's own limit.

    Returns:
        0, or the status of the first that failed; what all wrote to stdout, and to stderr.
    """
    with held_port() as port:
        meeting = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        meeting |= {"OMP_NUM_THREADS": 1}
        ranks = [Rank([module, *arguments], {**meeting, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(number)]
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


def _do(words: list[str], environment: dict[str, str], out: str, err: str, leads: bool) -> None:
    if leads:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    one_thread()
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["lsr-scale" if words[0] in (COMMAND, "lsr_scale") else words[0], *words[1:]]
    do_once(setattr)
    main = importlib.import_module("lsr_scale.cli" if words[0] == "lsr_scale" else words[0]).main
    gc.freeze()  # every run collects garbage, and need not look through half a million objects of the libraries
    status = main()
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none ends while another is in its last exchange
        torch.distributed.destroy_process_group()
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except BrokenPipeError:  # as Python ends: what stdout could not write is seen by the status
            status = 120 if name == "stdout" else status
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.exit(status)
