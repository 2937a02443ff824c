"""The front door's benchmark without a GPU: both sides run, at sizes that mean nothing."""

import json

import pytest

from benchmarks.speed import trainer_overhead
from tests.helpers.ranks import popen


@pytest.mark.slow
def test_the_command_and_the_bare_loop_are_measured_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", popen)
    out = tmp_path / "a.json"
    sizes = ["--model=tiny", "--device=cpu", "--tokens=128", "--seq-len=64", "--steps=8", "--logging-steps=2"]
    assert trainer_overhead.main([*sizes, "--memory", "save", "--rounds=1", f"--out={out}"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["command"][0] / row["bare"][0])
    assert min(*row["command"], *row["bare"]) > 0
    with pytest.raises(SystemExit):
        trainer_overhead.main([f"--out={out}"])
