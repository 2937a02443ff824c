"""Short runs side by side: one that fails, dies or hangs takes nothing along but itself."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import pool
from pool import Job, do_all


def act(what):
    """Do what the test wants of a process."""
    print(f"doing {what}")
    if what == "fail":
        raise ValueError("no good")
    if what == "leave":
        raise SystemExit(3)
    if what == "die":
        os._exit(9)
    if what == "hang":
        time.sleep(600)
    if what.startswith("tidy "):
        try:
            time.sleep(600)
        finally:
            Path(what.removeprefix("tidy ")).write_text("left in order")
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return what.upper()


def do(words, **options):
    """Return how many failed, what was ended, and the results by name."""
    waiting = [Job(f"{index}-{word}", (word,)) for index, word in enumerate(words)]
    found = {}
    failed, ended = do_all(
        lambda: waiting.pop(0) if waiting else None, act, lambda job, got: found.update({job.name: got}), **options
    )
    return failed, [job.name for job in ended], found


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_or_dies_is_counted_and_the_rest_goes_on(tmp_path, capsys, jobs):
    failed, ended, found = do(["a", "fail", "b", "die", "leave", "c"], jobs=jobs, logs=tmp_path)
    assert (failed, ended) == (3, [])
    assert found == {"0-a": "A", "2-b": "B", "5-c": "C"}
    said = capsys.readouterr().out
    assert "1-fail: failed: ValueError: no good" in said
    assert "3-die: failed: its process died" in said
    assert "no good" in (tmp_path / "1-fail.log").read_text()
    assert (tmp_path / "5-c.log").read_text() == "doing c\n"


def test_at_the_limit_what_is_in_hand_is_ended():
    began = time.monotonic()
    failed, ended, found = do(["a", "hang", "never"], time_limit=6.0)
    assert time.monotonic() - began < 20
    assert (failed, ended, found) == (0, ["1-hang"], {"0-a": "A"})


def test_what_is_ended_can_leave_in_order(tmp_path):
    note = tmp_path / "note"
    assert do([f"tidy {note}"], time_limit=5.0)[1] == [f"0-tidy {note}"]
    assert note.read_text() == "left in order"


def test_what_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 1.0)
    began = time.monotonic()
    assert do(["deaf"], time_limit=5.0)[1] == ["0-deaf"]
    assert time.monotonic() - began < 20
