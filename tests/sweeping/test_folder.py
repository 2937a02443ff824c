"""A sweep's folder: its state on disk, who claims which trial, and whose trials are free again."""

import json
import time
from typing import Any

import pytest

from lsr_scale import UserError
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState, Worker
from tests.helpers.programs import start_program


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three trials that have not begun."""
    made = SweepFolder(tmp_path)
    made.write(SweepState({}, {"stop": None}, "eval_loss", {name: TrialState(name, {}) for name in "abc"}))
    return made


def test_the_state_is_what_was_written(folder):
    with folder.updating() as state:
        state.trials["b"] = TrialState(
            "b", {"adapter.rank": 4}, "finished", 1, [2.5, None], score=1.5, results={"steps": 3}
        )
    again = folder.read()
    assert again == state
    assert json.loads(folder.state.read_text())["trials"][1]["changes"] == {"adapter.rank": 4}


def test_what_raises_within_an_update_changes_nothing(folder):
    before = folder.state.read_bytes()

    def fail():
        with folder.updating() as state:
            state.trials["a"].status = "running"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert folder.state.read_bytes() == before
    with folder.updating():
        pass  # and the lock is free


@pytest.mark.parametrize("content", ["[]", "{}", '{"run": {}, "sweep": {}, "scored_by": "x", "trials": [{"nme": 1}]}'])
def test_what_is_no_sweeps_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: is no sweep's, or another release's; move it away"):
        SweepFolder(tmp_path).read()


def test_each_trial_is_claimed_once(folder):
    one, other = Worker(folder), Worker(folder)
    other.name += "-other"
    with one.joined(), other.joined():
        claimed = [worker.claim() for worker in (one, other, one)]
        assert [trial.name for trial in claimed if trial] == ["a", "b", "c"]
        assert one.claim() is None
        assert not one.may_come()
    assert {trial.worker for trial in folder.read().trials.values()} == {one.name, other.name}
    assert not folder.workers.exists()


def test_the_trials_of_a_killed_worker_are_free_again(folder, tmp_path):
    program = (
        "import time\nfrom pathlib import Path\nfrom lsr_scale.sweeping.folder import SweepFolder, Worker\n"
        f"worker = Worker(SweepFolder(Path({str(folder.path)!r})))\n"
        "with worker.joined():\n    print(worker.claim().name, flush=True)\n    time.sleep(600)\n"
    )
    child = start_program(program, tmp_path, out := tmp_path / "out", tmp_path / "err")
    while out.read_text() != "a\n":
        assert child.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.02)
    worker = Worker(folder)
    with worker.joined():
        assert len(folder.alive(besides=worker.name)) == 1
        assert [trial.name for trial in (worker.claim(), worker.claim()) if trial] == ["b", "c"]
        assert worker.claim() is None
        child.kill()
        child.join()
        assert worker.may_come()
        trial = worker.claim()
        assert trial is not None
        assert trial.name == "a"
    assert folder.alive() == set()


def test_trials_are_ranked_by_their_score_and_how_far_they_came(folder):
    with folder.updating() as state:
        rows: tuple[tuple[str, Any, int, float | None], ...] = (
            ("a", "finished", 0, 2.0),
            ("b", "stopped", 0, 1.0),
            ("c", "failed", 0, None),
            ("d", "stopped", 1, 3.0),
            ("e", "finished", 2, 1.5),
            ("f", "finished", 0, float("nan")),
        )
        for name, status, rung, score in rows:
            state.trials[name] = TrialState(name, {}, status, rung, score=score)
    assert [trial.name for trial in state.ranked()] == ["e", "a", "d", "b", "c", "f"]
    state.scored_by = "accuracy"
    assert [trial.name for trial in state.ranked()][:2] == ["a", "e"]
