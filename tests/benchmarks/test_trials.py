"""The grid of short runs: equal tuning, every finished trial kept, none done twice, a diverged one never chosen."""

import json
import os

import pytest

from benchmarks.quality import trials
from benchmarks.quality.trials import (
    FILE,
    NUM_POINTS,
    TUNING_SEED,
    Provider,
    Trial,
    add,
    best_point,
    execute,
    load,
    plan,
    rates,
    spread,
    table,
    tuned_alike,
)
from tests.helpers.tiny_runs import do_all_here

PROVIDERS = {name: Provider("lora", {}, rates(1e-4, 2e-4, 3e-4, 4e-4, 5e-4)) for name in ("one", "two")}


def score(trial, point):
    """Train nothing: the third rate is best, the last one diverges."""
    if trial.provider == "two" and os.environ.get("TRIALS_FAIL"):
        raise RuntimeError("no")
    value = None if point["learning_rate"] > 4.5e-4 else 1 - abs(point["learning_rate"] - 3e-4)
    return {"score": value, "adapter_parameters": 7}


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    monkeypatch.setattr(trials, "do_all", do_all_here)


def test_every_provider_is_tuned_on_as_many_points():
    with pytest.raises(ValueError, match="expected 5 points"):
        tuned_alike({"one": Provider("lora", {}, rates(1e-4, 2e-4))})


def test_seeds_run_with_the_best_point_and_only_once(tmp_path, monkeypatch):
    todo = plan(["a"], PROVIDERS, 2)
    assert len(todo) == 2 * (NUM_POINTS + 2)
    monkeypatch.setenv("TRIALS_FAIL", "1")
    # the failed provider's tuning is missing, so its seeds are left, and the other's are all there
    assert execute(todo, PROVIDERS, score, tmp_path) == NUM_POINTS + 2
    first = (tmp_path / FILE).read_bytes()
    assert set(load(tmp_path)) == {trial.name for trial in todo if trial.provider == "one"}
    monkeypatch.delenv("TRIALS_FAIL")
    assert execute(todo, PROVIDERS, score, tmp_path) == 0
    done = load(tmp_path)
    assert (tmp_path / FILE).read_bytes().startswith(first)
    assert len((tmp_path / FILE).read_text().splitlines()) == len(done)
    assert best_point("a", "one", done) == 2
    assert {done[trial.name]["settings"]["learning_rate"] for trial in todo if not trial.tunes} == {3e-4}
    assert [line.split(" | ")[-2] for line in table(done, PROVIDERS)[2:]] == ["2", "2"]


def test_a_changed_point_is_done_again_and_with_it_the_seeds_that_it_changes(tmp_path, capsys):
    todo = plan(["a"], PROVIDERS, 1)
    assert execute(todo, PROVIDERS, score, tmp_path) == 0
    changed = {**PROVIDERS, "one": Provider("lora", {}, rates(1e-4, 2e-4, 2.5e-4, 4e-4, 5e-4))}
    capsys.readouterr()
    assert execute(todo, changed, score, tmp_path) == 0
    again = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert again == ["a-one-tune2", "a-one-seed0"]
    assert load(tmp_path)["a-one-seed0"]["settings"] == {"learning_rate": 2.5e-4}


def test_nothing_is_started_after_the_limit(tmp_path):
    assert execute(plan(["a"], ["one"], 1), PROVIDERS, score, tmp_path, time_limit=-1) == NUM_POINTS + 1
    assert not list(tmp_path.iterdir())


def test_a_line_that_a_kill_cut_short_is_no_result_and_harms_no_other(tmp_path):
    add(tmp_path, "a", {"score": 1})
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"name": "b", "sco')
    assert load(tmp_path) == {"a": {"score": 1}}
    add(tmp_path, "b", {"score": 2})
    add(tmp_path, "a", {"score": 3})
    assert load(tmp_path) == {"a": {"score": 3}, "b": {"score": 2}}


def test_diverged_runs_are_told_and_not_chosen(tmp_path):
    done = {Trial("a", "one", TUNING_SEED, i).name: {"score": None if i else 0.1} for i in range(NUM_POINTS)}
    assert best_point("a", "one", json.loads(json.dumps(done))) == 0
    assert spread([0.5, None]) == "50.0, 1 diverged"
    assert spread([None]) == "all 1 diverged"


def test_a_mean_over_tasks_is_of_the_seeds_that_have_all():
    scores = {("a", 0): 0.5, ("b", 0): 0.7, ("a", 1): 0.6, ("b", 1): 0.6, ("a", 2): 0.9}
    done = {
        f"{task}-one-seed{seed}": {
            **{"task": task, "provider": "one", "seed": seed, "score": value},
            **{"settings": {"learning_rate": 1e-3}, "adapter_parameters": 7},
        }
        for (task, seed), value in scores.items()
    }
    head, _, row = table(done, ["one"], {"a": "first"})
    assert head == "| method | parameters | first | b | mean | seeds | chosen settings |"
    assert row == "| one | 7 | 66.7 +- 20.8 | 65.0 +- 7.1 | 60.0 +- 0.0 | 2 to 3 | lr 0.001 |"
