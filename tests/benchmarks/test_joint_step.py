"""The benchmark of a step of many adapters, at sizes that mean nothing."""

import json

import pytest

from benchmarks.speed import joint_step


def test_every_way_is_timed_and_compared(tmp_path):
    out = tmp_path / "a.json"
    sizes = ["--cases=tiny", "--device=cpu", "--rounds=2", "--steps=2", "--warmup=1"]
    assert joint_step.main([*sizes, f"--out={out}"]) == 0
    row = json.loads(out.read_text())["rows"]["tiny"]
    assert set(row["step_ms"]) == set(joint_step.WAYS)
    assert all(len(times) == 4 for times in row["steps_ms"].values())
    ms = row["step_ms"]
    assert row["sequential_ratio_bare"] == pytest.approx(3 * ms["short"] / ms["joint"])
    assert row["long_ratio_bare"] == pytest.approx(ms["long"] / ms["joint"])
    assert row["base_ratio_bare"] == pytest.approx(ms["base"] / ms["joint"])
    assert row["tokens_per_s"]["short"] == pytest.approx(1e3 * 32 / ms["short"])


def test_what_the_time_does_not_allow_is_said(tmp_path, capsys):
    out = tmp_path / "a.json"
    assert joint_step.main(["--cases=tiny", "--device=cpu", "--time-limit=-1", f"--out={out}"]) == 1
    assert "tiny: not measured, the time is up" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        joint_step.main(["--cases=huge", f"--out={out}"])
