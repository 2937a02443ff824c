"""Short runs side by side: one that fails, dies or hangs takes nothing along but itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import ROOT, pool
from benchmarks.pool import Job, do_all


def act(what):
    """Do what the test wants of a process."""
    print(f"doing {what}")
    if what == "fail":
        raise ValueError("no good")
    if what == "leave":
        raise SystemExit(3)
    if what == "die":
        os._exit(9)
    if what.startswith("hang "):
        wait_for_ever(what)
    if what.startswith("tidy "):
        try:
            wait_for_ever(what)
        finally:
            Path(what.removeprefix("tidy ")).write_text("left in order")
    if what.startswith("deaf "):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_ever(what)
    return what.upper()


def wait_for_ever(what):
    """Leave a file to say that this process does."""
    Path(what.partition(" ")[2]).write_text("in hand")
    threading.Event().wait()


@pytest.fixture
def note(tmp_path, monkeypatch):
    """Return a file's name; once it is there, the pool's time is over."""
    file = tmp_path / "note"
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: 10.0 if file.exists() else 0.0))
    return file


def do(words, **options):
    """Return how many failed, what was ended, and the results by name."""
    waiting = [Job(f"{index}-{word}", (word,)) for index, word in enumerate(words)]
    results = {}
    failed, ended = do_all(
        lambda: waiting.pop(0) if waiting else None, act, lambda job, got: results.update({job.name: got}), **options
    )
    return failed, [job.name for job in ended], results


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_or_dies_is_counted_and_the_rest_goes_on(tmp_path, capsys, jobs):
    failed, ended, results = do(["a", "fail", "b", "die", "leave", "c"], jobs=jobs, logs=tmp_path)
    assert (failed, ended) == (3, [])
    assert results == {"0-a": "A", "2-b": "B", "5-c": "C"}
    said = capsys.readouterr().out
    assert "1-fail: failed: ValueError: no good" in said
    assert "3-die: failed: its process died" in said
    assert "no good" in (tmp_path / "1-fail.log").read_text()
    assert (tmp_path / "5-c.log").read_text() == "doing c\n"


def test_at_the_limit_what_is_in_hand_is_ended(note):
    failed, ended, results = do(["a", f"hang {note}", "never"], time_limit=0.2)
    assert (failed, ended, results) == (0, [f"1-hang {note}"], {"0-a": "A"})


def test_what_is_ended_can_leave_in_order(note, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 3600.0)
    assert do([f"tidy {note}"], time_limit=0.2)[1] == [f"0-tidy {note}"]
    assert note.read_text() == "left in order"


def test_what_does_not_leave_is_killed(note, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.1)
    assert do([f"deaf {note}"], time_limit=0.2)[1] == [f"0-deaf {note}"]


# hangs in a job; says which process does it
PARENT = """
import os, sys
from benchmarks.pool import Job, do_all
from tests.benchmarks.test_pool import hang_and_tell
if __name__ == "__main__":
    jobs = [Job("one", (sys.argv[1],))]
    do_all(lambda: jobs.pop() if jobs else None, hang_and_tell, print)
"""


def hang_and_tell(path):
    """Write this process's number to a file, and go on for ever."""
    Path(f"{path}.part").write_text(str(os.getpid()))
    Path(f"{path}.part").rename(path)
    threading.Event().wait()


@pytest.mark.slow
def test_jobs_end_with_the_program_that_gave_them_though_it_was_killed(tmp_path):
    program, told = tmp_path / "parent.py", tmp_path / "pid"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(program), str(told)], env=environment) as parent:
        while not told.exists():
            assert parent.poll() is None
            time.sleep(0.01)
        worker = psutil.Process(int(told.read_text()))
        assert worker.ppid() == parent.pid
        parent.kill()
    psutil.wait_procs([worker])
    assert not worker.is_running()
