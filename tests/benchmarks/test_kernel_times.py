"""The kernels' benchmark runs, and what it runs is right."""

import json

import pytest

from benchmarks.speed import kernel_times


def test_every_case_runs_and_agrees_with_float64(tmp_path):
    out = tmp_path / "tiny.json"
    assert kernel_times.main(["--tiny", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 30
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == 11
    assert max(errors) < 1e-2
    with pytest.raises(SystemExit):
        kernel_times.main(["--tiny", "--out", str(out)])
