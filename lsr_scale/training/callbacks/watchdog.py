"""Ends the process that started it when another process of the run has ended: the first would wait for it too long.

    python watchdog.py TEXT PROCESS:STARTED ...          # until its input says something, or ends

With NCCL a collective waits ten minutes for who is gone, and SIGTERM is but a request while training (see `signals`).
A thread would not do: whoever waits so is soon within a launch that lets no other thread run. So this is a process,
of the standard library alone. It reads /proc; where there is none, nobody is seen and nothing is ended.
"""

import os
import select
import signal
import sys
from pathlib import Path
from typing import NamedTuple

AFTER_S = 5.0  # a collective that fails says more, and sooner


class Seen(NamedTuple):
    """A process by its host and number, and by when it was started, as numbers are used again."""

    host: str
    process: int
    started: str | None

    def is_alive_on(self, host: str) -> bool:
        """Tell whether this is a process that can be seen on this host, where `host` is its name."""
        return self.host == host and self.started is not None and started(self.process) == self.started


def started(process: int) -> str | None:
    """Return when a process was started, in ticks since the system was; None if it has ended or cannot be seen."""
    fields = fields_of(process)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def fields_of(process: int) -> list[str] | None:
    """Return what the system tells of a process after its name: state, parent, ...; None where it does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None


def main() -> None:
    """Look about once a second."""
    parent, text = os.getppid(), sys.argv[1]
    others = [word.split(":") for word in sys.argv[2:]]

    def over(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0]) or os.getppid() != parent

    while not over(1.0):
        if any(started(int(process)) != since for process, since in others) and not over(AFTER_S):
            os.kill(parent, signal.SIGKILL)
            print(f"\n{text}", file=sys.stderr, flush=True)
            return


if __name__ == "__main__":
    main()
