"""The curves of a real model: runs that a user could write, one file of all curves, and what is not finite is said."""

import json
import math

import pytest

from benchmarks.robustness import real_model_curves as curves
from lsr_scale.config import run_from_dict
from tests.helpers.tiny_runs import completions, do_all_here, save_llama, write_rows


def test_every_way_once():
    assert len(curves.WAYS) == len({way.name for way in curves.WAYS}) == 16


@pytest.mark.parametrize("way", curves.WAYS, ids=lambda way: way.name)
def test_a_way_is_a_run_that_a_user_could_write(way, tmp_path):
    for task in curves.TASKS:
        (tmp_path / task).mkdir()
    data = curves.sources([tmp_path])
    assert [source["path"] for source in data] == [str(tmp_path / task) for task in curves.TASKS]
    run = run_from_dict(curves.config_of(way, "MODEL", data, tmp_path, None), way.name)
    assert run.model.quantization == ("nf4" if way.base == "nf4" else "none")
    assert (run.training["packing"], run.training["fused"]) == (way.batches == "packed", way.fused)
    assert run.adapter.method == way.method


@pytest.mark.filterwarnings("ignore")
def test_runs_leave_their_curves_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "do_all", do_all_here)
    rows = write_rows(tmp_path / "rows.jsonl", completions(64))
    options = ["--model", str(save_llama(tmp_path / "model")), "--data", rows, "--steps", "2", "--only", "lora-bf16"]
    options += ["--out", str(tmp_path / "curves.json"), "--work", str(tmp_path / "work")]
    assert curves.main([*options]) == 0
    content = json.loads((tmp_path / "curves.json").read_text())
    assert [run["name"] for run in content["runs"]] == [
        f"lora-bf16-{batches}-{how}" for batches in ("padded", "packed") for how in ("fused", "unfused")
    ]
    for run in content["runs"]:
        assert run["finite"]
        assert [step for step, _ in run["curve"]] == [1, 2]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "4 of 4 runs finite" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        curves.main([*options])
    assert "never overwritten" in capsys.readouterr().err


def test_what_is_not_finite_is_said(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"train_runtime": 3}\n')
    curve = curves.curve_of(file)
    assert curve[0] == (1, 2.0)
    assert math.isnan(curve[1][1])
    assert curves.curve_of(tmp_path / "none") == []
    run = {"name": "a run", "curve": curve, "finite": False, "exit_status": 1, "wall_s": 3.0}
    assert "0 of 1 runs finite" in curves.table([run])
    assert " NO " in curves.table([run])
