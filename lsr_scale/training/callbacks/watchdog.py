"""Kills the process that started it when another process of the run has ended, for which it would wait too long.

    python watchdog.py MESSAGE PID:STARTED ...          # until its input says something, or ends

With NCCL a collective waits ten minutes for a rank that is gone, and SIGTERM is only a request while training (see
`signals`). A thread would not do: a process that waits so is soon within a kernel launch that holds the GIL. So this is
a process, of the standard library alone. It reads /proc; where there is none, no process is watched or killed.
"""

import os
import select
import signal
import sys
from pathlib import Path
from typing import NamedTuple

GRACE_S = 5.0  # a collective that fails says more, and sooner


class Process(NamedTuple):
    """A process by its host and id, and by when it was started, as ids are reused."""

    host: str
    pid: int
    started: str | None

    def is_alive_on(self, host: str) -> bool:
        """Tell whether this process runs on this host, whose name is `host`."""
        return self.host == host and self.started is not None and start_time(self.pid) == self.started


def start_time(pid: int) -> str | None:
    """Return when a process was started, in ticks since boot; None if it has ended or /proc does not show it."""
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name: state, parent, ...; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None


def main() -> None:
    """Look about once a second."""
    parent, message = os.getppid(), sys.argv[1]
    peers = [word.split(":") for word in sys.argv[2:]]

    def is_over(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0]) or os.getppid() != parent

    while not is_over(1.0):
        if any(start_time(int(pid)) != started for pid, started in peers) and not is_over(GRACE_S):
            os.kill(parent, signal.SIGKILL)
            print(f"\n{message}", file=sys.stderr, flush=True)
            return


if __name__ == "__main__":
    main()
