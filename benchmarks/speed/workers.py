"""Providers in processes of their own: started side by side, asked one at a time, ended whatever they are busy with."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.processes import end_with_parent
from benchmarks.speed.providers import MissingError, find_provider

# This file imports nothing heavy: every worker imports it first, and Unsloth wants to come before Transformers.


def failure(error: BaseException) -> dict[str, str]:
    """Return an exception as a reply: `oom`, `missing` or `error`, with the last lines of its traceback."""
    print(f"--- {type(error).__name__}", flush=True)
    traceback.print_exception(error)
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return {"status": "oom", "detail": str(error).split("\n")[0][:300]}
    if isinstance(error, MissingError):
        return {"status": "missing", "detail": str(error)}
    lines = "".join(traceback.format_exception(error)).strip().split("\n")
    return {"status": "error", "detail": "\n".join(lines[-6:])[-1500:]}


def work(connection: Any, name: str, settings: dict[str, Any], log: str) -> None:
    """Build a provider in this process, then answer requests to measure until told to stop.

    Args:
        connection: This end of the pipe.
        name: The provider, see `providers.find_provider`.
        settings: The run's configuration, and `mode`, the checkpointing that the worker starts with.
        log: File that takes everything printed.
    """
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # so that compilers that it starts can be ended with it
    end_with_parent()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    try:
        began = time.perf_counter()
        provider = find_provider(name)(settings)
        provider.build()
        connection.send({"status": "ready", "detail": "", "seconds": time.perf_counter() - began})
    except BaseException as error:
        connection.send(failure(error))
        return
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        try:
            reply = {"status": "ok", **provider.measure(request)}
        except BaseException as error:
            reply = failure(error)
            # the traceback's frames hold the step's activations
            traceback.clear_frames(error.__traceback__)
            del error
        with contextlib.suppress(Exception):
            provider.free_memory()
        connection.send(reply)


class Worker:
    """A provider in a process of its own, as the benchmark sees it."""

    def __init__(self, provider: str, modes: list[str], config: dict[str, Any], log: Path) -> None:
        self.provider, self.modes, self.config, self.log = provider, modes, config, log
        self.process: Any = None
        self.connection: Any = None
        self.broken: dict[str, Any] | None = None

    def start(self) -> None:
        """Start building; `await_ready` tells how it went."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        settings = {**self.config, "mode": self.modes[0]}
        arguments = (theirs, self.provider, settings, str(self.log))
        self.process = context.Process(target=work, args=arguments, daemon=False)
        self.process.start()
        theirs.close()

    def receive(self, limit_s: float, doing: str) -> dict[str, Any]:
        """Return the worker's next reply; if it died or took too long, one that says so, and it is ended."""
        try:
            if self.connection.poll(max(0.0, limit_s)):
                return self.connection.recv()
            reply = {"status": "error", "detail": f"{doing} took more than {limit_s:.0f} s; it was stopped"}
        except (EOFError, OSError):
            self.process.join(60)
            reply = {"status": "error", "detail": f"its process died while {doing}, exit code {self.process.exitcode}"}
        self.broken = reply
        self.stop()
        return reply

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Have the worker measure once."""
        if self.broken:
            return self.broken
        with contextlib.suppress(OSError):  # dead; receive says so
            self.connection.send(request)
        return self.receive(limit_s, "measuring")

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process is None:
            return
        if self.process.is_alive() and not self.broken:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(10)
        # its own process group, once it has made one; never this process's
        with contextlib.suppress(OSError):
            if os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self.connection.close()
        self.process = None


def start_all(workers: list[Worker], limit_s: float) -> None:
    """Start workers side by side and wait until each is ready, has failed or has run out of time."""
    began = time.monotonic()
    for worker in workers:
        worker.start()
    waiting = list(workers)
    while waiting:
        left = limit_s - (time.monotonic() - began)
        ready = wait([worker.connection for worker in waiting], timeout=max(0.0, left))
        for worker in [w for w in waiting if w.connection in ready] or waiting:
            waiting.remove(worker)
            reply = worker.receive(max(0.0, left), "building")
            if reply["status"] != "ready":
                worker.broken = reply
                worker.stop()
            say(f"{worker.provider}: {reply['status']} after {time.monotonic() - began:.0f} s {last_line(reply)}")


def last_line(reply: dict[str, Any]) -> str:
    """Return the last line of a reply's detail."""
    return reply.get("detail", "").strip().split("\n")[-1]


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)
