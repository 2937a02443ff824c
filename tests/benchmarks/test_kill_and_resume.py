"""The benchmark of kills in its shortest form: one kill, within a save."""

import json
import subprocess
import sys

import pytest

from benchmarks import ROOT


@pytest.mark.slow
def test_a_run_killed_within_a_save_resumes_to_the_same_adapter(tmp_path):
    out = tmp_path / "kills.json"
    options = ["--kills", "1", "--in-saves", "1", "--steps", "8", "--save-steps", "2", "--seed", "1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.robustness.kill_and_resume", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert (result["phases"], result["resumed"], result["same_adapter"]) == ({"save": 1}, 1, 1)
