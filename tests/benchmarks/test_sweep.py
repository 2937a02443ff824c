"""The measurement of sweeps runs end to end, and its ratios are of what it measured."""

import json

import pytest

from benchmarks.speed import sweep


def test_trials_together_beside_one_alone(tmp_path):
    out = tmp_path / "sweep.json"
    sizes = ["--model=tiny", "--trials=2", "--one-by-one=1", "--tokens=64", "--seq-len=16", "--steps=8"]
    arguments = [*sizes, "--logging-steps=2", "--device=cpu", "--ways=together,one_by_one", f"--out={out}"]
    assert sweep.main(arguments) == 0
    result = json.loads(out.read_text())
    mine, alone = result["rows"]["together"], result["rows"]["one_by_one"]
    assert len(mine["by_run"]) == 2
    assert mine["tokens_per_s"] == pytest.approx(sum(mine["by_run"]))
    assert len(alone["by_run"]) == 1
    ratio = result["ratios"]["steps_over_one_by_one"]
    assert ratio == pytest.approx(mine["tokens_per_s"] / alone["tokens_per_s"])
    assert result["ratios"]["all_over_one_by_one"] == pytest.approx(alone["seconds"] / mine["seconds"])
    assert result["ratios"]["cpu_of_one_by_one"] == pytest.approx(mine["cpu_s"] / alone["cpu_s"])
    assert mine["cpu_s"] > 0
    assert mine["gib"] is None


def test_rates_cover_the_range():
    assert sweep.rates(1) == [sweep.RATES[0]]
    assert sweep.rates(3) == pytest.approx([1e-4, (1e-4 * 2e-3) ** 0.5, 2e-3])
