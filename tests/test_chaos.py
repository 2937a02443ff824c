"""The promise of every command on hostile inputs: 300 seeded cases; `python -m tests.chaos` does as many as asked."""

import pytest

from tests.chaos import runner as chaos


@pytest.mark.parametrize("name", chaos.names(300))
def test_a_hostile_input_is_answered_or_refused_in_words_and_nothing_is_lost(name):
    outcome = chaos.run_case(name)
    assert outcome.is_good, f"{outcome.kind}: {outcome.what}\n{' '.join(outcome.words)[:300]}\n{outcome.said[-3000:]}"


def test_the_judge_tells_each_way_to_break_the_promise():
    refusal = chaos.Case(["config"])

    def kind(status, err="lsr-scale: a.yaml: no\n", changed=(), planted=False, case=refusal):
        return chaos.judge(case, status, "", err, list(changed), planted)[0]

    assert kind(2) == "refused"
    assert kind(0) == "accepted and wrong"
    assert kind(2, err="") == "accepted and wrong"
    assert kind(0, case=chaos.Case(["config"], "answered")) == "answered"
    assert kind(2, case=chaos.Case(["config"], "answered")) == "refused and right"
    assert kind(2, case=chaos.Case(["config"], says=("line 3",))) == "accepted and wrong"
    assert kind(2, changed=["notes.txt"]) == "destroyed"
    assert kind(2, planted=True) == "unsafe"
    assert kind("hung") == "hung"
    assert kind("traceback") == kind(1) == kind(2, err="Traceback (most recent call last)") == "traceback"
    assert kind(2, err="no\n" * 25) == kind(2, err="x" * 2000) == kind(2, err="\x1b[2J\n") == "filled the screen"


def test_what_changed_outside_the_output_folder_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("notes.txt")
    before = chaos.snapshot(tmp_path)
    (tmp_path / "out/new.txt").write_text("x")
    assert chaos.changes(before, chaos.snapshot(tmp_path), ("out",), ()) == []
    assert chaos.changes(before, chaos.snapshot(tmp_path), ("out",), ("out/new.txt",)) == ["out/new.txt"]
    (tmp_path / "notes.txt").write_text("nime")
    (tmp_path / "link").unlink()
    assert chaos.changes(before, chaos.snapshot(tmp_path), ("out",), ()) == ["link", "notes.txt"]
