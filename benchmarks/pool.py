"""Many short runs side by side: processes that import once, do one after the other, and are ended at a limit."""

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import end_with_parent

DIED = "its process died"
GRACE_S = 20.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A call that a process is to make; its name is for messages and for its log."""

    name: str
    arguments: tuple[Any, ...]


class Worker:
    """A process that makes one call after another."""

    def __init__(self, call: Callable[..., Any], jobs: int, logs: Path | None) -> None:
        """Start it.

        Args:
            call: What is called with a job's arguments, a function of a module or a partial one.
            jobs: So many processes share the processor's cores.
            logs: Folder for what a job prints, `<name>.log`; None leaves it where this process prints.
        """
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.process = context.Process(target=_serve, args=(theirs, call, threads, logs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Have it make a call."""
        self.connection.send(job)
        self.job = job

    def take(self) -> tuple[Job, Any, str]:
        """Return the job that it has ended, what the call returned, and what went wrong if something did."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, *self.connection.recv()
        except EOFError:
            return job, None, DIED

    def ask_to_end(self) -> None:
        """Have it leave by itself: idle it does so at once, busy it stops what it does."""
        if self.job is not None:
            self.process.terminate()
        self.connection.close()

    def stop(self, grace_s: float = 0.0) -> None:
        """End it, whatever it does."""
        self.process.join(grace_s)
        self.process.kill()
        self.process.join()


class _Ended(BaseException):
    """Asked to leave; no `Exception`, which a call may well catch."""


def _leave(*_: Any) -> None:
    raise _Ended


def _serve(connection: Any, call: Callable[..., Any], threads: int, logs: Path | None) -> None:
    """Make the calls that come; in a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()
    with contextlib.suppress(_Ended, EOFError, BrokenPipeError):
        signal.signal(signal.SIGTERM, _leave)
        _serve_all(connection, call, threads, logs)


def _serve_all(connection: Any, call: Callable[..., Any], threads: int, logs: Path | None) -> None:
    while True:
        job = connection.recv()
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / f"{job.name}.log", "w", encoding="utf-8") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        result, wrong = None, ""
        try:
            result = call(*job.arguments)
        except _Ended:
            raise
        except BaseException as error:  # a library's SystemExit too: the process serves others
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next call's, and that of other processes
            torch.cuda.reset_peak_memory_stats()
        connection.send((result, wrong))


def do_all(
    next_job: Callable[[], Job | None],
    call: Callable[..., Any],
    take: Callable[[Job, Any], None],
    jobs: int = 1,
    time_limit: float = float("inf"),
    logs: Path | None = None,
) -> tuple[int, list[Job]]:
    """Make calls in so many processes until none is left or the time is over; then running ones are stopped.

    Args:
        next_job: Returns what can be begun now, once, or None: asked again whenever a call has ended.
        call: Makes a call in a process, with a job's arguments.
        take: Is given each job that went well with what its call returned.
        jobs: Processes.
        time_limit: Seconds.
        logs: Folder for what jobs print.

    Returns:
        How many calls failed, and the jobs that were ended.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a kill ends the processes as well
    began, failed = time.monotonic(), 0
    workers: list[Worker] = []
    try:
        while (left := time_limit - (time.monotonic() - began)) > 0:
            idle = [worker for worker in workers if worker.job is None]
            while (idle or len(workers) < jobs) and (job := next_job()) is not None:
                if not idle:
                    idle.append(Worker(call, jobs, logs))
                    workers.append(idle[0])
                idle.pop().give(job)
            busy: list[Any] = [worker.connection for worker in workers if worker.job is not None]
            if not busy:
                break
            heard = multiprocessing.connection.wait(busy, timeout=min(left, 3600.0))
            for worker in [worker for worker in workers if worker.connection in heard]:
                job, result, wrong = worker.take()
                if not wrong:
                    take(job, result)
                    continue
                failed += 1
                print(f"{job.name}: failed: {wrong}" + (f", see {logs}" if logs is not None else ""), flush=True)
                if wrong == DIED:
                    workers.remove(worker)
                    worker.stop()
    finally:
        ended = [worker.job for worker in workers if worker.job is not None]
        # under NVIDIA's MPS a process that is killed while kernels of it run takes the others' with it: ask first
        for worker in workers:
            worker.ask_to_end()
        until = time.monotonic() + GRACE_S
        for worker in workers:
            worker.stop(max(0.0, until - time.monotonic()))
    return failed, ended
