"""The benchmark of kills in its shortest form: one kill, within a save."""

import json
import sys

import pytest

from benchmarks.robustness import kill_and_resume
from tests.helpers.ranks import popen


@pytest.mark.slow
def test_a_run_killed_within_a_save_resumes_to_the_same_adapter(tmp_path, monkeypatch):
    out = tmp_path / "kills.json"
    options = ["--kills", "1", "--in-saves", "1", "--steps", "8", "--save-steps", "2", "--seed", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["kill_and_resume", *options])
    monkeypatch.setattr("subprocess.Popen", popen)
    assert kill_and_resume.main() == 0
    result = json.loads(out.read_text())
    assert (result["phases"], result["resumed"], result["same_adapter"]) == ({"save": 1}, 1, 1)
