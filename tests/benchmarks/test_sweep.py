"""The measurement of sweeps runs end to end, and its ratios are of what it measured."""

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.speed import sweep
from tests.helpers.ranks import popen


def test_trials_together_beside_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", popen)
    # of a process that is forked off another one's libraries it would know nothing
    monkeypatch.setattr(sweep, "processor_seconds", itertools.accumulate(itertools.count(), initial=0.0).__next__)
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
    assert (mine["cpu_s"], alone["cpu_s"]) == (0.0, 2 * 2.0), "of one trial of two"
    assert mine["gib"] is None


def test_processor_seconds_are_of_the_processes_that_have_ended():
    before = sweep.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert sweep.processor_seconds() > before


def test_a_sweep_that_chooses_says_how_many_train_at_a_time():
    args = argparse.Namespace(trials=8, together="auto", gpus=0)
    chosen = "4 trials share a step: a step takes a trial 20.0 ms alone, 12.0 in one of 2"
    assert sweep.at_a_time(args, ["something else", chosen]) == 4
    assert sweep.at_a_time(args, ["trials are trained one after the other: a step takes"]) == 1
    args.gpus = 2
    assert sweep.at_a_time(args, [chosen, chosen]) == 8
    assert sweep.at_a_time(args, [chosen, "trials are trained one after the other: a step takes"]) == 5
    assert sweep.at_a_time(args, [chosen]) == 5  # a process of which one trial is left says nothing
    assert sweep.at_a_time(args, []) == 2
    args.together = 3
    assert sweep.at_a_time(args, []) == 6


def test_rates_cover_the_range():
    assert sweep.rates(1) == [sweep.RATES[0]]
    assert sweep.rates(3) == pytest.approx([1e-4, (1e-4 * 2e-3) ** 0.5, 2e-3])


def test_the_rate_of_all_is_of_the_time_in_which_all_take_steps():
    # the second run begins late; each logs every 10 steps, 20 steps a second together from second 4 on
    seen = [(0.0, [0, 0]), (1.0, [30, 0]), (2.0, [60, 0]), (3.0, [70, 10]), (4.0, [80, 20]), (4.5, [80, 20])]
    seen += [(5.0, [90, 30]), (6.0, [100, 40]), (6.4, [100, 40])]
    assert sweep.common_rate(seen, 20, 64) == pytest.approx(20 * 64)
    assert sweep.common_rate(seen[:5], 20, 64) is None
    assert sweep.common_rate(seen, 1000, 64) is None


# a process that logs a step every 20 ms, as the command's does
LOGS = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1]) / "metrics.jsonl"
path.parent.mkdir()
for step in range(1, int(sys.argv[2]) + 1):
    with path.open("a") as stream:
        print(json.dumps({"step": step}), file=stream)
    time.sleep(0.02)
"""


def test_processes_side_by_side_are_ended_when_one_is_done(tmp_path, monkeypatch):
    started = []

    def start(folder, name, command, run):
        steps = "100" if name == "rate-0" else "1000000"
        program = [sys.executable, "-c", LOGS, run["training"]["output_dir"], steps]
        started.append(subprocess.Popen(program))
        return started[-1]

    monkeypatch.setattr(sweep, "start", start)
    args = argparse.Namespace(trials=2, beside_steps=100, logging_steps=1, tokens=64)
    rate = sweep.rate_of_all(tmp_path, {"training": {}}, args, end=time.monotonic() + 600)
    assert rate is None or rate > 0  # on a busy machine one may be done before the other begins
    assert [process.returncode for process in started] != [None, None]
    assert started[1].returncode == -signal.SIGTERM
