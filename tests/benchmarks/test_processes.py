"""What a benchmark started ends with all that it started itself."""

import fcntl
import subprocess
import sys

import pytest

from benchmarks.processes import kill_all

# a launcher, whose worker is in a session of its own, as torchrun's are, and holds a lock
WORKER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("in hand", flush=True)
time.sleep(3600)
"""
LAUNCHER = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}, sys.argv[1]], start_new_session=True)"
)


def test_a_launchers_workers_have_ended_and_hold_nothing_once_it_was_killed(tmp_path):
    lock = tmp_path / "lock"
    words = [sys.executable, "-c", LAUNCHER, str(lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in hand\n"
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kill_all(process)
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert process.returncode < 0
    kill_all(process)  # which is no error
