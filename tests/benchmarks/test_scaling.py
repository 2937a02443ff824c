"""The benchmark of several GPUs, on CPU processes: the command runs under its launcher, and its rows become a table."""

import json
import shutil

import pytest

from benchmarks.report import plots, results_page
from benchmarks.speed import scaling
from tests.helpers.ranks import popen

SIZES = ["--model=tiny", "--device=cpu", "--tokens=128", "--seq-len=64", "--steps=8", "--logging-steps=2"]


@pytest.mark.slow
def test_two_processes_are_compared_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", popen)
    out = tmp_path / "scaling" / "a.json"
    assert scaling.main([*SIZES, "--gpus=2", "--stages=1", f"--out={out}"]) == 0
    run = json.loads(out.read_text())
    alone, two = run["rows"]
    assert [(r["num_gpus"], r["zero_stage"], r["status"]) for r in run["rows"]] == [(1, None, "ok"), (2, 1, "ok")]
    assert two["scaling"] == pytest.approx(two["tokens_per_s"] / alone["tokens_per_s"])
    assert alone["loss_first"] == pytest.approx(two["loss_first"], rel=1e-2)  # other rows, the same model
    assert str(tmp_path) not in run["config"]["command"]
    page = results_page.page(tmp_path)
    assert f"| 2, ZeRO-1 | {two['tokens_per_s']:,.0f} |" in page
    plots.scaling_plot(run, out.with_suffix(".png"))
    assert plots.drawn_from(out.with_suffix(".png")) == plots.scaling_digest(run)
    with pytest.raises(SystemExit):  # never written over
        scaling.main([*SIZES, f"--out={out}"])


def test_what_fails_is_a_row_that_says_so(tmp_path, monkeypatch):
    def fails(folder, run, limit, launcher):
        if launcher:
            raise scaling.TrainingError(
                "torch.OutOfMemoryError: CUDA out of memory. Tried" if launcher[-1] == "2" else "no"
            )
        return 100.0, [{"loss": 2.0, "memory_gib": 1.0}]

    monkeypatch.setattr(scaling, "trained", fails)
    out = tmp_path / "scaling" / "a.json"
    assert scaling.main([*SIZES, "--gpus", "1", "2", "--stages", "3", f"--out={out}"]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["status"], row["scaling"]) for row in rows] == [("ok", 1.0), ("error", None), ("oom", None)]
    assert "| 2, ZeRO-3 | oom |" in results_page.page(tmp_path)
    shutil.rmtree(tmp_path / "scaling")
    with pytest.raises(SystemExit):  # too few steps for a figure
        scaling.main([*SIZES, "--steps", "4", f"--out={out}"])
