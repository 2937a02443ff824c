"""`training.early_stopping`: when it stops, which adapter is kept, and what a run that resumes knows."""

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lsr_scale import UserError
from lsr_scale.config import dump_yaml, run_from_dict
from lsr_scale.config.training import compared_by
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.train import _better_step, train
from tests.helpers.run_text import MINIMAL, load, problem
from tests.helpers.tiny_runs import (
    do,
    factors,
    labelled,
    metrics,
    results,
    same,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)
from tests.training.test_resume import Killed, arrange_stop

HELD_OUT = "data.validation_split=0.1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder whose held-out row is not helped by what is learned."""
    folder = tmp_path_factory.mktemp("early")
    save_llama(folder / "model")
    write_rows(folder / "held.jsonl", [{"prompt": "a", "completion": "@#{}[]|~^"}])
    return folder


def worsening(place, folder, patience=2, threshold=0.0, **training):
    """Return a run of 24 steps, evaluated after each, whose evaluations soon only worsen."""
    values = {
        "output_dir": str(folder),
        "num_train_epochs": 4,
        "learning_rate": 0.2,
        "save_steps": 1,
        "save_total_limit": 2,
        "early_stopping": {"patience": patience, "threshold": threshold},
        **training,
    }
    return tiny_run(place, data={"validation": [str(place / "held.jsonl")]}, training=values, eval={"tasks": []})


def evaluations(folder):
    return {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}


def expected_stop(losses, patience, threshold=0.0):
    """Return the step that training stops after, by the definition."""
    best, count = float("inf"), 0
    for step, loss in losses.items():
        count = 0 if best - loss > threshold else count + 1
        best = min(best, loss)
        if count >= patience:
            return step
    return None


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """Return the folder of a run with the most patience, and what it would have stopped after with less."""
    folder = do(worsening(place, tmp_path_factory.mktemp("whole"), patience=1000))
    losses = evaluations(folder)
    assert list(losses) == list(range(1, 25)), "every step is evaluated"
    return losses


@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_training_stops_after_so_many_evaluations_without_improvement_and_keeps_the_best(
    place, tmp_path, whole, patience, threshold, capsys
):
    stop = expected_stop(whole, patience, threshold)
    assert stop is not None
    assert stop < 24, "or this test sees nothing"
    train(worsening(place, tmp_path / "run", patience, threshold))
    folder = RunFolder(tmp_path / "run")
    losses = evaluations(folder)
    assert losses == {step: loss for step, loss in whole.items() if step <= stop}
    best = min(losses, key=lambda step: losses[step])
    found = results(folder)
    assert (found["steps"], found["best_step"]) == (stop, best)
    assert same(factors(folder), factors(folder, f"checkpoint-{best}"))
    assert {f"checkpoint-{best}", f"checkpoint-{stop}"} <= {path.name for path in folder.checkpoints()}
    said = capsys.readouterr().out
    by = f" by more than {threshold:g}" if threshold else ""
    times = "evaluation" if patience == 1 else f"{patience} evaluations"
    assert f"stopped early after step {stop}: eval_loss is no better{by} for {times}\n" in said
    assert f"the adapter is that of step {best}, the best by eval_loss\n" in said


def test_a_run_that_does_not_stop_early_ends_with_its_last_step(place, tmp_path, whole, capsys):
    train(worsening(place, tmp_path, patience=1000, max_steps=4, save_steps=2))
    assert results(RunFolder(tmp_path))["steps"] == 4
    assert list(evaluations(RunFolder(tmp_path))) == [2, 4]
    assert "stopped early" not in capsys.readouterr().out


def test_the_last_adapter_is_kept_where_that_is_wanted_and_it_is_said(place, tmp_path, whole, capsys):
    stop = expected_stop(whole, 2)
    train(worsening(place, tmp_path, load_best_model_at_end=False))
    folder = RunFolder(tmp_path)
    assert same(factors(folder), factors(folder, f"checkpoint-{stop}"))
    assert f"the adapter is that of the last step, {stop} (training.load_best_model_at_end: false)" in (
        capsys.readouterr().out
    )


def test_a_better_step_than_the_last_is_named_with_a_way_to_keep_it_that_works(place, tmp_path, capsys):
    every = {"eval_strategy": "steps", "eval_steps": 1}
    train(worsening(place, tmp_path / "last", early_stopping=None, **every))
    losses = evaluations(RunFolder(tmp_path / "last"))
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    said = capsys.readouterr().out
    assert f"the adapter is that of the last step, {last}\n" in said
    assert f"eval_loss was {losses[best]:.4f} at step {best}, and is {losses[last]:.4f} at the last, {last}; " in said
    assert "training.early_stopping: {patience: 3} keeps" in said
    advised = [{"early_stopping": {"patience": 3}}, {"early_stopping": None, "load_best_model_at_end": True}]
    for number, values in enumerate(advised):
        folder = tmp_path / str(number)
        train(worsening(place, folder, save_strategy="steps", **every, **values))
        said = capsys.readouterr().out
        assert f"the adapter is that of step {results(RunFolder(folder))['best_step']}, the best by" in said
        assert " at the last, " not in said


def test_the_better_step_of_grpo_is_that_of_the_higher_reward():
    history = [{"step": 1, "eval_loss": 0.0, "eval_reward": 0.9}, {"step": 2, "eval_loss": 0.1, "eval_reward": 0.4}]
    args = SimpleNamespace(metric_for_best_model=None, greater_is_better=None)
    state, handler = SimpleNamespace(log_history=history), SimpleNamespace(callbacks=[])
    trainer: Any = SimpleNamespace(args=args, state=state, callback_handler=handler)
    said = _better_step(trainer, compared_by("causal_lm", "grpo"))
    assert said.startswith("eval_reward was 0.9000 at step 1, and is 0.4000 at the last, 2; training.early_stopping")


@pytest.mark.parametrize(
    "kept",
    [
        *("early_stopping={}", "load_best_model_at_end=true"),
        *("lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_type=greedy"),
    ],
)
def test_grpo_keeps_the_step_of_the_highest_reward(kept):
    grpo = ["method=grpo", "reward=[exact_answer]", "eval_strategy=steps", "save_strategy=steps", kept]
    run = load(MINIMAL, HELD_OUT, *(f"training.{one}" for one in grpo))
    assert run.training["metric_for_best_model"] == "eval_reward"


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["method=grpo", "reward=[exact_answer]"], {"mode": "max"}),
        (["method=grpo", "reward=[exact_answer]", "lr_scheduler_kwargs={factor: 0.5}"], {"factor": 0.5, "mode": "max"}),
        (["method=grpo", "reward=[exact_answer]", "lr_scheduler_kwargs={mode: min}"], {"mode": "min"}),
        (["method=grpo", "reward=[exact_answer]", "metric_for_best_model=eval_kl"], None),
        (["method=dpo", "metric_for_best_model=eval_rewards/accuracies"], {"mode": "max"}),
        ([], None),
    ],
)
def test_a_schedule_that_follows_a_metric_takes_its_highest_value_for_the_best(schedule, words, arguments):
    steered = [f"lr_scheduler_type={schedule}", "eval_strategy=steps"]
    run = load(MINIMAL, HELD_OUT, *(f"training.{one}" for one in (*steered, *words)))
    assert run.training.get("lr_scheduler_kwargs") == arguments
    assert run_from_dict(yaml.safe_load(dump_yaml(run))).training == run.training


def test_a_run_that_resumes_has_counted_the_evaluations_before(place, tmp_path, whole):
    stop = expected_stop(whole, 3)
    run = worsening(place, tmp_path, patience=3)
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, stop)  # of the three evaluations without improvement two are before it
        with pytest.raises(Killed):
            do(run)
    folder = do(run, resume="auto")
    assert results(folder)["steps"] == stop
    assert evaluations(folder) == {step: loss for step, loss in whole.items() if step <= stop}


def test_a_run_that_had_stopped_early_is_finished_until_its_patience_is_raised(place, tmp_path, whole, capsys):
    stop, later = expected_stop(whole, 1), expected_stop(whole, 3)
    assert stop < later
    folder = do(worsening(place, tmp_path, patience=1))
    adapter = factors(folder)
    capsys.readouterr()
    train(worsening(place, tmp_path, patience=1), resume="auto")
    said = capsys.readouterr().out
    assert "nothing was left to train" in said
    assert f"stopped early after step {stop}" in said
    assert same(factors(folder), adapter)
    do(worsening(place, tmp_path, patience=3), resume="auto")
    assert results(folder)["steps"] == later


def test_it_can_begin_where_a_run_resumes(place, tmp_path, whole):
    kept = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 2)
        with pytest.raises(Killed):
            do(worsening(place, tmp_path, early_stopping=None, **kept))
    folder = do(worsening(place, tmp_path, patience=4), resume="auto")
    assert 3 <= results(folder)["steps"] < 24


def test_a_classifier_stops_by_its_accuracy(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "pairs.jsonl", labelled())
    training = {"early_stopping": {"patience": 2}, "metric_for_best_model": "accuracy", "save_steps": 1}
    run = tiny_run(
        tmp_path,
        model={"task": "seq_cls", "num_labels": 2, "quantization": "none"},
        adapter={"target_modules": ["query", "value"]},
        data={"train": [rows], "validation": [rows]},
        training={**training, "num_train_epochs": 4, "learning_rate": 0.0},
        eval={"tasks": []},
    )
    assert results(do(run))["steps"] == 3, "a first evaluation, and two that are no better"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("steps", 0.1, "steps", 0.1)),
        (["training.save_steps=50"], ("steps", 50, "steps", 50)),
        (["training.eval_steps=20"], ("steps", 20, "steps", 20)),
        (["training.eval_steps=20", "training.save_steps=40"], ("steps", 20, "steps", 40)),
        (["training.eval_strategy=epoch"], ("epoch", None, "epoch", 0.1)),
        (["training.save_strategy=epoch"], ("epoch", None, "epoch", 0.1)),
        (["training.eval_strategy=epoch", "training.save_strategy=best"], ("epoch", None, "best", 0.1)),
        (["training.save_strategy=best"], ("steps", 0.1, "best", 0.1)),
    ],
)
def test_what_is_evaluated_is_saved_by_default(words, expected):
    training = load(MINIMAL, HELD_OUT, "training.early_stopping={}", *words).training
    assert training["early_stopping"] == {"patience": 3, "threshold": 0.0}
    assert training["load_best_model_at_end"] is True
    assert training["metric_for_best_model"] == "eval_loss"
    names = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")
    assert tuple(training.get(name) for name in names) == expected


def test_a_run_without_it_is_as_it_was():
    training = load(MINIMAL, HELD_OUT).training
    assert training["early_stopping"] is None
    assert "load_best_model_at_end" not in training


def test_a_resolved_run_reads_as_it_was_written():
    run = load(MINIMAL, HELD_OUT, "training.early_stopping={patience: 2, threshold: 1}")
    assert run.training["early_stopping"] == {"patience": 2, "threshold": 1}
    assert run_from_dict(yaml.safe_load(dump_yaml(run))) == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["training.early_stopping={}"],
            "goes by evaluations, and the run has none; add data.validation_split: 0.05 or",
        ),
        ([HELD_OUT, "training.early_stopping={}", "training.eval_strategy=no"], "has none; add eval_strategy: steps"),
        ([HELD_OUT, "training.early_stopping=3"], "training.early_stopping: expected mapping, got 3"),
        ([HELD_OUT, "training.early_stopping={patience: 0}"], "patience: expected a number >= 1, got 0"),
        ([HELD_OUT, "training.early_stopping={threshold: -1}"], "threshold: expected a number >= 0, got -1"),
        ([HELD_OUT, "training.early_stopping={patience: 1.5}"], "patience: expected int, got 1.5"),
        ([HELD_OUT, "training.early_stopping={patiense: 1}"], "patiense: unknown key; did you mean 'patience'?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, message):
    assert message in problem(MINIMAL, *words)
    assert "problems" not in problem(MINIMAL, *words), "one mistake, one line"


def test_saves_that_no_evaluation_goes_with_are_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"training\.(eval|save)_st.*round multiple"):
        do(worsening(place, tmp_path, eval_steps=2, save_steps=3))
