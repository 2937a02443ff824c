"""Runs of the accuracy comparisons as trials of sweeps: the runs that they are by themselves, with their results."""

from pathlib import Path

import pytest

from benchmarks.quality import ablations, commonsense, commonsense_data, sweeps, trials
from benchmarks.quality.commonsense import Setting
from benchmarks.quality.commonsense_methods import PROVIDERS
from benchmarks.quality.trials import TUNING_SEED, Trial
from lsr_scale.config import run_from_dict
from lsr_scale.config.trials import sweep_from_dict
from tests.helpers.tiny_runs import save_llama

SETTING = Setting(Path("work"), "some/model")


def configs_of_commonsense():
    runs = [run for run in commonsense.plan(["headline"], list(PROVIDERS), 2) if run.base == "bf16"]
    points = {run.name: dict(PROVIDERS[run.provider].points[run.point or 0]) for run in runs}
    return {run.name: commonsense.config_of(run, points[run.name], SETTING) for run in runs}


def configs_of_ablations():
    plan = trials.plan(["small"], ablations.PROVIDERS, 2)
    points = {one.name: ablations.PROVIDERS[one.provider].points[one.point or 0] for one in plan}
    return {one.name: ablations.config_of(Path("work"), "some/model", False, one, points[one.name]) for one in plan}


@pytest.mark.parametrize("configs", [configs_of_commonsense, configs_of_ablations])
def test_a_trial_is_the_run_that_it_would_be_by_itself(configs):
    given = configs()
    names = [*given][:6] + [*given][-6:]  # tuning, and seeds with other epochs
    given = {name: given[name] for name in names}
    sweep = sweep_from_dict(sweeps.sweep_sections(given, Path("out"), "auto"))
    assert [trial.name for trial in sweep.trials] == names
    for trial in sweep.trials:
        alone = run_from_dict(given[trial.name]).model_dump()
        swept = trial.run.model_dump()
        for one in (alone, swept):
            del one["training"]["output_dir"]
        assert swept == alone


def test_trials_of_a_sweep_have_the_results_of_runs_one_by_one(data, tmp_path, monkeypatch):
    commonsense_data.prepare(data, tmp_path / "work")
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    config_of = ablations.config_of

    def in_float32(*args):
        config = config_of(*args)
        return {**config, "model": {**config["model"], "dtype": "float32"}}

    monkeypatch.setattr(ablations, "config_of", in_float32)
    names = ("r4_s16", "lora_2")
    group = [(Trial("small", name, TUNING_SEED, 0), dict(ablations.PROVIDERS[name].points[0])) for name in names]
    given = tmp_path / "work", model, True
    swept = ablations.measure_together(*given, 2, group)
    for trial, point in group:
        alone = ablations.measure(*given, trial, point)
        assert swept[trial.name].pop("final_loss") == pytest.approx(alone.pop("final_loss"), abs=1e-5)
        for name in ablations.CONDITIONS:
            assert swept[trial.name].pop(name, 0) == pytest.approx(alone.pop(name, 0), rel=1e-4)
        assert swept[trial.name] == alone


def test_all_that_can_be_done_is_one_call_and_is_kept_by_trial(tmp_path, capsys):
    provider = {"a": trials.Provider("lora", {}, trials.rates(1.0, 2.0, 3.0, 4.0, 5.0))}
    runs = trials.plan(["task"], provider, 2)
    assert trials.execute(runs, provider, several_alone, tmp_path, several=several) == 1
    done = trials.load(tmp_path)
    assert "task-a-seed1: failed" in capsys.readouterr().out
    assert sorted(done) == [*(f"task-a-seed{seed}" for seed in (0,)), *(f"task-a-tune{index}" for index in range(5))]
    assert done["task-a-seed0"]["settings"] == {"learning_rate": 5.0}, "tuned by the calls before"
    assert done["task-a-seed0"]["group"] == 2


def several_alone(trial, point):
    raise AssertionError("each is a trial of a sweep")


def several(group):
    return {
        trial.name: {"score": point["learning_rate"], "group": len(group)}
        for trial, point in group
        if trial.name != "task-a-seed1"
    }
