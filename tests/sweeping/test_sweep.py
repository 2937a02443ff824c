"""Whole sweeps of tiny runs: what trains, what ends alone, what resumes, and what the folder holds afterwards."""

import errno
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import lsr_scale
from lsr_scale import UserError
from lsr_scale.cli import main
from lsr_scale.config import load_run
from lsr_scale.config.trials import sweep_from_dict
from lsr_scale.files import is_own_picture
from lsr_scale.report.write import show_at_end, write_report
from lsr_scale.run.evaluate import evaluate_run
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import read_metrics
from lsr_scale.scoring import scorer
from lsr_scale.scoring.scorer import encode_examples
from lsr_scale.sweeping import driver, pages, plots
from lsr_scale.sweeping.bases import load_base_for
from lsr_scale.sweeping.board import Board
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState
from lsr_scale.sweeping.sweep import run_sweep
from lsr_scale.sweeping.table import write_table
from lsr_scale.training import compute
from lsr_scale.training.callbacks.signals import Terminated
from lsr_scale.training.steps.joint import JointStep
from lsr_scale.training.steps.sharing import runs_fused
from tests.helpers.programs import start_program
from tests.helpers.run_folders import losses, rewards, write_run
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import completions, do, factors, metrics, questions, results, same, write_rows
from tests.helpers.tiny_sweeps import sections, sweep_place, tiny_sweep, write_sweep
from tests.training.test_grpo import grpo_run, prompts
from tests.training.test_resume import arrange_stop

RATES = [2e-3, 5e-3]
LORA = {"method": "lora", "rank": 2, "target_modules": SEVEN_LINEARS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return sweep_place(tmp_path_factory.mktemp("sweeps"))


def do_sweep(place, output, section, *, resume=None, overwrite=False, **changes):
    """Do a sweep quietly; return its folder."""
    return run_sweep(tiny_sweep(place, output, section, **changes), "run", resume, overwrite, quiet=True)


def assert_alike(first, second):
    """Check that adapters are equal, but for what other members of a joint step change in the order of sums."""
    assert first.keys() == second.keys()
    for name, factor in first.items():
        assert torch.allclose(factor, second[name], rtol=1e-4, atol=1e-6), name


def statuses(folder):
    return {trial.name: trial.status for trial in folder.read().trials.values()}


@pytest.fixture(scope="module")
def done(place, with_pages):
    """Return the folder of a sweep of four trials, one of whose rates diverges, and whose other rows are bad, and what
    was printed.
    """
    broken = place / "broken.jsonl"
    broken.write_text('{"prompt": 3}\n')
    entries = [
        {"training.learning_rate": RATES[0]},
        {"training.learning_rate": 1e6},
        {"name": "bad", "data.train": [str(broken)]},
        {"training.learning_rate": RATES[1], "adapter.rank": 2},
    ]
    with with_pages():
        return do_sweep(place, place / "done", {"list": entries, "together": 1})


def columns_of(folder):
    """Return the columns of a sweep's table, by their headings."""
    lines = [line for line in folder.table.read_text().split("\n") if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {heading: [row[index] for row in cells[2:]] for index, heading in enumerate(cells[0])}


@pytest.mark.parametrize("held_out", [True, False])
def test_trials_of_grpo_are_ordered_by_what_completions_are_worth(tmp_path, held_out):
    data = {"train": [str(tmp_path / "prompts.jsonl")]}
    training = {"output_dir": str(tmp_path / "run"), "report_to": "none"}
    if held_out:
        data["validation"] = [write_rows(tmp_path / "held-out.jsonl", prompts(2))]
        training |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    model = {"quantization": "none", "dtype": "float32"}
    run = grpo_run(tmp_path, model=model, data=data, training=training)
    sweep = sweep_from_dict({**run.model_dump(), "sweep": {"grid": {"training.learning_rate": [1e-4, 5e-2]}}})
    folder = run_sweep(sweep, quiet=True)
    state = folder.read()
    name = "eval_reward" if held_out else "final_reward"
    assert state.scored_by == name
    scores = [trial.score for trial in state.ranked()]
    for trial in state.trials.values():
        assert trial.score == pytest.approx(results(folder.trial(trial.name))[name], abs=1e-6)
    columns = columns_of(folder)
    heading = "eval reward" if held_out else "training reward"
    assert columns[heading] == [f"{score:.4f}" for score in scores]
    assert not any("loss" in heading for heading in columns)
    left = {path.name for path in folder.path.iterdir()} - {".sweep.lock"}
    assert left == {"sweep.json", "sweep.md", "rewards.png", "scores.png", "trials"}
    state.trials["lr=0.05"].score = 9.0
    assert [trial.name for trial in state.ranked()] == ["lr=0.05", "lr=0.0001"]


def test_a_score_that_results_do_not_have_is_that_of_the_evaluations(place, tmp_path):
    section = {"grid": {"training.learning_rate": RATES}, "stop": {"metric": "eval_entropy", "keep": 0.9}}
    folder = do_sweep(place, tmp_path / "sweep", {**section, "together": 1})
    for trial in folder.read().trials.values():
        last = [row["eval_entropy"] for row in metrics(folder.trial(trial.name)) if "eval_entropy" in row][-1]
        assert trial.score == last


def test_what_diverges_or_fails_ends_alone_and_is_named(done):
    state = done.read()
    assert statuses(done) == {
        "lr=0.002": "finished",
        "lr=1e+06": "diverged",
        "bad": "failed",
        "lr=0.005,rank=2": "finished",
    }
    assert "is not finite" in str(state.trials["lr=1e+06"].error)
    assert "broken.jsonl" in str(state.trials["bad"].error)
    assert state.trials["lr=1e+06"].score is None
    for name in ("lr=0.002", "lr=0.005,rank=2"):
        trial = state.trials[name]
        assert trial.score == results(done.trial(name))["eval_loss"] == trial.results["eval_loss"]
        assert trial.results["steps"] == 6
    diverged, rows = state.trials["lr=1e+06"], read_metrics(done.trial("lr=1e+06").nonfinite)
    assert diverged.results["steps"] == rows[0]["step"] - 1
    assert diverged.results["trainable_parameters"] == state.trials["lr=0.002"].results["trainable_parameters"]


def test_a_trial_that_a_full_disk_ends_is_named_without_a_traceback(place, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(driver, "train", full)
    folder = do_sweep(place, tmp_path / "sweep", {"grid": {"training.learning_rate": RATES}, "together": 1})
    assert {trial.status for trial in folder.read().trials.values()} == {"failed"}
    assert all("No space left on device" in str(trial.error) for trial in folder.read().trials.values())
    assert not caplog.records


def test_what_a_trial_ended_by_is_said_without_its_advice(capsys):
    error = "the loss is nan at step 4 (process 0; the tokens are in nonfinite.jsonl); set training.on_nonfinite: skip"
    wild = TrialState("wild", {}, "diverged", error=error)
    Board(live=False).end(wild, SweepState({}, {}, "eval_loss", {"wild": wild}))
    said = "wild: diverged: the loss is nan at step 4 (process 0; the tokens are in nonfinite.jsonl) (0:00)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("command", ["eval", "generate", "report", "inspect", "export", "compare"])
def test_the_folder_of_a_sweep_is_told_from_a_runs(done, command, tmp_path, capsys):
    words = {"export": ["--to", "lora", "--out", str(tmp_path / "lora")], "generate": ["--prompt", "a knife"]}
    assert main([command, str(done.path), *words.get(command, [])]) == 2
    said = capsys.readouterr().err
    assert f"{done.path}: a sweep's folder, where a run's is expected; name one of its trials: " in said
    assert f"{done.path}/trials/lr=0.002," in said
    assert f"the best one is named in {done.table}" in said


def test_a_trials_folder_is_an_ordinary_runs(done, place, tmp_path):
    folder = done.trial("lr=0.005,rank=2")
    run = load_run(folder.config)
    assert (run.training["learning_rate"], run.adapter.options["rank"]) == (RATES[1], 2)
    scored = evaluate_run(str(folder.path), [write_rows(tmp_path / "questions.jsonl", questions())])
    assert scored["accuracy"]
    assert folder.report.is_file()
    alone = do(run.model_copy(update={"training": {**run.training, "output_dir": str(tmp_path / "alone")}}))
    assert same(factors(alone), factors(folder)), "as it would be alone"
    assert [row.get("loss") for row in metrics(alone)] == [row.get("loss") for row in metrics(folder)]


def test_the_table_is_sorted_and_names_the_command_for_the_best_one_alone(done):
    text = done.table.read_text()
    best, *others = sorted(("lr=0.002", "lr=0.005,rank=2"), key=lambda name: done.read().trials[name].score)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["trial", "---", best, *others, "lr=1e+06", "bad"]
    assert f"    lsr-scale train {done.trial(best).config} --set training.output_dir=runs/{best}\n" in text
    assert "- bad: " in text


@pytest.mark.usefixtures("rendered")
def test_the_pictures_are_drawn(done):
    plots.draw(done, done.read(), {"lr=0.002": RATES[0], "lr=0.005,rank=2": RATES[1]})
    assert is_own_picture(done.losses)
    assert is_own_picture(done.scores)
    left = {path.name for path in done.path.iterdir()} - {".sweep.lock"}
    assert left == {"sweep.json", "sweep.md", "losses.png", "scores.png", "trials"}


def test_a_picture_of_what_was_trained_here_before_does_not_stay(tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    state = SweepState({}, {}, "eval_loss", {"only": TrialState("only", {}, "finished")})
    for rows, drawn in ((losses(), folder.losses), (rewards(), folder.rewards)):
        trial = folder.trial("only")
        shutil.rmtree(trial.path, ignore_errors=True)
        write_run(trial.path, metrics=rows)
        plots.draw(folder, state, {})
        assert list(folder.path.glob("*.png")) == [drawn]
    folder.losses.write_text("mine")
    plots.draw(folder, state, {})
    assert folder.losses.read_text() == "mine"


def test_the_name_of_the_best_one_stays_within_the_picture():
    names = [f"{number}-{'x' * 78}" for number in range(3)]
    trials = [TrialState(name, {}, "finished", score=2.0 + index) for index, name in enumerate(names)]
    for trial, number in zip(trials, (1144, 1600, 9000), strict=True):
        trial.results["trainable_parameters"] = number
    figure = plots.scores_figure(trials, "eval_loss", dict(zip(names, (1e-3, 2e-3, 4e-3), strict=True)), "sweep")
    figure.draw_without_rendering()
    assert f"star: {names[0]}" in figure.get_suptitle()
    (heading,) = (text for text in figure.texts if names[0] in text.get_text())
    place = heading.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.width
    for panel, numbers in zip(figure.axes, ({"1,000", "2,000", "5,000"}, {"0.001", "0.002", "0.005"}), strict=True):
        low, high = panel.get_xlim()
        shown = [t.get_text() for t in panel.get_xticklabels() if low <= t.get_position()[0] <= high]
        assert set(filter(None, shown)) <= numbers


def test_what_hollow_points_are_is_said_where_there_are_any():
    trials = [TrialState(name, {}, status, score=2.0) for name, status in (("a", "finished"), ("b", "stopped"))]
    headings = [plots.scores_figure(part, "eval_loss", {}, "sweep").get_suptitle() for part in (trials[:1], trials)]
    assert ["hollow: ended before" in heading for heading in headings] == [False, True]


def test_pages_are_drawn_at_the_end_and_what_lacks_one_gets_it(done, monkeypatch):
    names = ["lr=0.002", "lr=0.005,rank=2"]
    for name in names:
        assert done.trial(name).report.is_file()
        assert is_own_picture(done.trial(name).curve)
    for file in (done.trial(names[1]).report, done.trial(names[1]).curve):
        file.unlink()  # as if killed before
    drawn = []
    monkeypatch.setattr(pages, "show_at_end", lambda folder, plan: drawn.append(folder) or show_at_end(folder, plan))
    pages.draw_trials(done, names, pytest.fail)
    assert drawn == [done.trial(names[1])]
    assert done.trial(names[1]).report.is_file()
    assert is_own_picture(done.trial(names[1]).curve)


def test_a_plan_is_made_once_for_all_of_whom_it_says_the_same(place, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("lsr_scale.planning.plan", lambda run, gpus, trace: made.append(run) or object())
    trials = tiny_sweep(place, tmp_path, {"grid": {"training.learning_rate": RATES, "adapter.rank": [2, 3]}}).trials
    plan = pages.Plans()
    found = [plan(trial.run, 1, False) for trial in trials]
    assert len(made) == len(set(map(id, found))) == 2
    plan(trials[0].run, 2, False)
    assert len(made) == 3


def test_a_picture_that_cannot_be_drawn_is_said_and_the_next_one_is(done, monkeypatch):
    monkeypatch.setattr(pages, "show_at_end", lambda folder, plan: "note: the report is not written: full")
    done.trial("lr=0.002").report.rename(done.path / "kept")
    said = []
    pages.draw_trials(done, ["lr=0.002", "lr=0.005,rank=2"], said.append)
    (done.path / "kept").rename(done.trial("lr=0.002").report)
    assert said == ["note: the report is not written: full (lr=0.002)"]


def test_the_base_is_loaded_once(place, tmp_path, monkeypatch):
    loaded = []

    def load(*args, **options):
        loaded.append(args)
        return load_base_for(*args, **options)

    monkeypatch.setattr("lsr_scale.sweeping.bases.load_base_for", load)
    folder = do_sweep(place, tmp_path / "sweep", {"grid": {"training.seed": [1, 2]}, "together": 1}, max_steps=1)
    assert set(statuses(folder).values()) == {"finished"}
    assert len(loaded) == 1


def test_questions_are_encoded_once_for_all_trials_before_training_and_after(place, tmp_path, monkeypatch):
    encoded = []

    def encoding(tokenizer, examples, **options):
        encoded.append([example.id for example in examples])
        return encode_examples(tokenizer, examples, **options)

    monkeypatch.setattr(scorer, "encode_examples", encoding)
    tasks = [write_rows(tmp_path / f"{name}.jsonl", questions(number)) for name, number in (("one", 2), ("two", 3))]
    section = {"grid": {"training.seed": [1, 2]}, "together": 2}
    given = sections(place, tmp_path / "sweep", section, max_steps=1)
    folder = run_sweep(sweep_from_dict({**given, "eval": {"tasks": tasks, "before": True}}), "run", quiet=True)
    assert set(statuses(folder).values()) == {"finished"}
    assert sorted(map(len, encoded)) == [2, 3]


def test_each_trial_may_have_its_own_rows(place, tmp_path):
    entries = []
    for number, name in enumerate(("alice", "bob")):
        path = write_rows(tmp_path / f"{name}.jsonl", completions(4 + 2 * number))
        entries.append({"name": name, "data.train": [path]})
    folder = do_sweep(place, tmp_path / "sweep", {"list": entries}, max_steps=2)
    for number, name in enumerate(("alice", "bob")):
        source = json.loads(folder.trial(name).data.read_text())["train"][0]
        assert source["path"].endswith(f"{name}.jsonl")
        assert source["num_rows"] == 4 + 2 * number


@pytest.mark.parametrize("together", [1, 2])
def test_a_signal_saves_what_is_under_way_and_the_sweep_goes_on_from_there(place, tmp_path, monkeypatch, together):
    section = {"grid": {"training.seed": [1, 2, 3]}, "together": together}
    whole = do_sweep(place, tmp_path / "whole", section)
    arrange_stop(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Terminated, match=r"ended by SIGTERM with 0 of 3 trials done, in .*; the same command with"):
        do_sweep(place, tmp_path / "sweep", section)
    folder = SweepFolder(tmp_path / "sweep")
    assert set(statuses(folder).values()) == {"pending"}
    begun = [name for name in statuses(folder) if folder.trial(name).own_checkpoints()]
    assert len(begun) == together
    do_sweep(place, tmp_path / "sweep", section, resume="auto")
    for name, status in statuses(folder).items():
        assert status == "finished"
        assert_alike(factors(folder.trial(name)), factors(whole.trial(name)))
        assert [row["step"] for row in metrics(folder.trial(name)) if "loss" in row] == list(range(1, 7))


def test_a_killed_sweep_goes_on(place, tmp_path):
    section = {"grid": {"training.learning_rate": RATES}, "together": 1}
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", section)
    program = (
        "import time\nfrom lsr_scale.cli import main\nfrom lsr_scale.training.callbacks.progress import Progress\n"
        "log = Progress.on_log\n"
        "def on_log(self, args, state, *rest, **more):\n"
        "    log(self, args, state, *rest, **more)\n"
        "    if 'lr=0.005' in args.output_dir and state.global_step == 3:\n"
        "        print('now', flush=True)\n        time.sleep(600)\n"
        "Progress.on_log = on_log\n"
        f"main(['sweep', {str(file)!r}])\n"
    )
    child = start_program(program, tmp_path, out := tmp_path / "out", tmp_path / "err")
    while "now\n" not in out.read_text():
        assert child.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.02)
    child.kill()
    child.join()
    folder = SweepFolder(tmp_path / "sweep")
    assert statuses(folder) == {"lr=0.002": "finished", "lr=0.005": "running"}
    finished = folder.trial("lr=0.002").results.stat().st_mtime_ns
    assert main(["sweep", str(file), "--resume", "auto", "--quiet"]) == 0
    assert statuses(folder) == {"lr=0.002": "finished", "lr=0.005": "finished"}
    assert folder.trial("lr=0.002").results.stat().st_mtime_ns == finished, "what finished is kept"
    assert main(["sweep", str(file)]) == 2, "it holds a sweep already"


@pytest.mark.parametrize("own", [False, True], ids=["another number", "the same number"])
def test_trials_that_were_under_way_when_their_process_was_killed_share_steps_again(place, tmp_path, monkeypatch, own):
    section = {"grid": {"training.seed": [1, 2]}, "together": 2}
    arrange_stop(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Terminated):
        do_sweep(place, tmp_path / "sweep", section)
    folder = SweepFolder(tmp_path / "sweep")
    with folder.updating() as state:  # as if killed: in a container the next process often has the same number
        for trial in state.trials.values():
            trial.status, trial.worker = "running", f"{socket.gethostname()}-{os.getpid() + 1 - own}"
    steps = []
    run = JointStep.run
    monkeypatch.setattr(JointStep, "run", lambda self, members: steps.append(len(members)) or run(self, members))
    do_sweep(place, tmp_path / "sweep", section, resume="auto")
    assert set(statuses(folder).values()) == {"finished"}
    assert 2 in steps


def test_trials_that_cannot_run_fused_share_no_step_with_those_that_do(place, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "runs_fused", lambda run, pays: runs_fused(run, pays=True))  # as on a GPU
    steps = []
    run = JointStep.run

    def noting(self, members):
        steps.append(sorted(type(member.model.base_model).__name__ for member in members))
        return run(self, members)

    monkeypatch.setattr(JointStep, "run", noting)
    methods = [{"method": name, "target_modules": SEVEN_LINEARS} for name in ("lora", "krona", "vera", "lsr")]
    section = {"list": [{"name": one["method"], "adapter": one} for one in methods], "together": 4}
    folder = do_sweep(place, tmp_path / "sweep", section, max_steps=3)
    assert set(statuses(folder).values()) == {"finished"}
    assert steps == [["LoraModel", "LsrModel"]] * 3 + [["KronaModel", "VeraModel"]] * 3


@pytest.mark.parametrize("stop", [None, {"metric": "eval_loss", "after": 0.5, "keep": 0.9}], ids=["to the end", "rung"])
def test_a_trial_that_shares_no_step_keeps_no_other_from_it(place, tmp_path, monkeypatch, capsys, stop):
    steps = []
    run = JointStep.run
    monkeypatch.setattr(JointStep, "run", lambda self, members: steps.append(len(members)) or run(self, members))
    entries = [{"name": "drops", "adapter": {**LORA, "dropout": 0.1}}, {"name": "lora", "adapter": LORA}]
    section = {"list": [*entries, {"name": "lsr", "training.seed": 2}], "together": 3}
    given = tiny_sweep(place, tmp_path / "sweep", section | ({"stop": stop} if stop else {}), max_steps=4)
    folder = run_sweep(given, "run")
    assert set(statuses(folder).values()) == {"finished"}
    assert steps == [2] * 4
    why = "adapter.dropout is not 0: its random numbers would not be those of the run alone; 0 lets it share steps"
    assert f"note: trained alone, as they share no step: drops ({why})\n" in capsys.readouterr().out
    for name in ("drops", "lora", "lsr"):
        run_of = load_run(folder.trial(name).config)
        alone = do(run_of.model_copy(update={"training": {**run_of.training, "output_dir": str(tmp_path / name)}}))
        assert_alike(factors(alone), factors(folder.trial(name)))


@pytest.mark.parametrize("together", [1, 2])
def test_memory_is_freed_once_for_all_trials_that_ended_before_others_begin(place, tmp_path, monkeypatch, together):
    happened = []
    ended, free = driver.Driver.ended, driver._free_memory
    monkeypatch.setattr(driver.Driver, "ended", lambda *a: happened.append("end") or ended(*a))
    monkeypatch.setattr(driver, "_free_memory", lambda: happened.append("free") or free())
    section = {"grid": {"training.seed": [1, 2, 3, 4]}, "together": together}
    do_sweep(place, tmp_path / "sweep", section, max_steps=1)
    assert happened == [*["end"] * together, "free"] * (4 // together)


def test_overwriting_starts_again(place, tmp_path):
    section = {"grid": {"training.seed": [1, 2]}, "together": 1}
    folder = do_sweep(place, tmp_path / "sweep", section, max_steps=2)
    first = {name: folder.trial(name).results.read_text() for name in statuses(folder)}
    do_sweep(place, tmp_path / "sweep", section, overwrite=True, max_steps=3)
    for name, text in first.items():
        assert (json.loads(text)["steps"], results(folder.trial(name))["steps"]) == (2, 3)
        assert not folder.read().trials[name].overwrite


@pytest.mark.parametrize("together", [1, 3])
def test_halving_stops_the_worse_and_the_best_is_as_if_it_had_never_paused(place, tmp_path, together):
    stop = {"metric": "eval_loss", "after": 0.34, "keep": 0.34}
    section = {"grid": {"training.learning_rate": [1e-4, *RATES]}, "stop": stop, "together": together}
    folder = do_sweep(place, tmp_path / "sweep", section)
    state = folder.read()
    assert sorted(trial.status for trial in state.trials.values()) == ["finished", "finished", "stopped"]
    scores = {name: trial.rung_scores[0] for name, trial in state.trials.items()}
    assert state.trials[max(scores, key=lambda name: scores[name] or 0)].status == "stopped"
    for name, trial in state.trials.items():
        rows = metrics(folder.trial(name))
        assert [row["eval_loss"] for row in rows if row["step"] == 3 and "eval_loss" in row] == [scores[name]]
        if trial.status == "stopped":
            assert trial.results["steps"] == 3
            assert not folder.trial(name).has_adapter()
        else:
            run = load_run(folder.trial(name).config)
            alone = do(run.model_copy(update={"training": {**run.training, "output_dir": str(tmp_path / name)}}))
            assert results(alone)["final_loss"] == pytest.approx(results(folder.trial(name))["final_loss"], abs=1e-6)


def test_what_is_printed_is_short(place, tmp_path, capsys):
    section = {"grid": {"training.learning_rate": RATES}, "together": 1}
    file = write_sweep(tmp_path / "run.yaml", place, Path("out"), section, max_steps=1)
    assert main(["sweep", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep folder: out, 2 trials"
    assert lines[1] == "trial 1 of 2 begins: lr=0.002"
    assert lines[2].startswith("loading ")
    assert any(line.startswith("lr=0.005: finished, eval loss ") for line in lines)
    assert lines[-3].startswith("best: lr=0.00")
    assert lines[-2].startswith("again, alone: lsr-scale train out/trials/lr=0.00")
    assert lines[-1] == "table: out/sweep.md, pictures: out/losses.png, out/scores.png"


def test_the_best_one_runs_again_by_the_command_that_is_given(done, tmp_path):
    folder = SweepFolder(tmp_path / "my sweep")
    shutil.copytree(done.path, folder.path)
    write_table(folder, folder.read())
    command = next(line for line in folder.table.read_text().splitlines() if line.startswith("    lsr-scale train"))
    assert main([*shlex.split(command)[1:], "--quiet", "--set", "training.max_steps=1"]) == 0
    name = command.rpartition("runs/")[2]
    assert results(RunFolder(Path("runs") / name))["steps"] == 1


def test_trials_that_cannot_share_steps_are_trained_one_after_the_other_and_it_is_said_why(place, tmp_path, capsys):
    sweep = tiny_sweep(place, tmp_path / "sweep", {"grid": {"adapter.dropout": [0.1, 0.2]}}, max_steps=1)
    folder = run_sweep(sweep, "run")
    assert set(statuses(folder).values()) == {"finished"}
    said = capsys.readouterr().out
    assert "note: trials are trained one after the other, as they cannot share steps: adapter.dropout is not 0" in said


def test_trials_that_share_no_step_may_take_as_many_rows_a_step_as_they_like(place, tmp_path):
    values = {"training.per_device_train_batch_size": [1, 2], "training.loss_type": ["nll", "dft"]}
    sweep = tiny_sweep(place, tmp_path / "sweep", {"grid": values, "together": 1}, max_steps=2)
    folder = run_sweep(sweep, quiet=True)
    for trial in sweep.trials:
        alone = trial.run.training | {"output_dir": str(tmp_path / trial.name)}
        expected = do(trial.run.model_copy(update={"training": alone}))
        assert same(factors(expected), factors(folder.trial(trial.name)))


def test_a_machine_without_fp8_is_told_so_once_before_a_folder_is_made(place, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "fp8_fallback_reason", lambda device: "the GPU has compute capability 8.0")
    given = sections(place, tmp_path / "sweep", {"grid": {"training.seed": [1, 2]}})
    given["model"]["dtype"], given["training"]["compute"] = "bfloat16", "fp8"
    with pytest.raises(UserError, match=r"^training\.compute: fp8 cannot be here: the GPU .* 8\.0; set training"):
        lsr_scale.sweep(given, quiet=True)
    assert not (tmp_path / "sweep").exists()


def test_a_base_that_cannot_be_loaded_ends_the_sweep(place, tmp_path):
    given = sections(place, tmp_path / "sweep", {"grid": {"training.seed": [1, 2]}}, max_steps=1)
    given["model"]["name"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing"):
        lsr_scale.sweep(given, quiet=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trials_together_on_a_gpu_end_as_they_would_alone(place, tmp_path):
    section = {
        "list": [{"adapter.rank": 2}, {"training.learning_rate": RATES[0]}, {"adapter": LORA}, {"training.seed": 1}]
    }
    alone = do_sweep(place, tmp_path / "alone", {**section, "together": 1})
    joint = do_sweep(place, tmp_path / "joint", {**section, "together": 4})
    measured = do_sweep(place, tmp_path / "auto", section)
    for name in statuses(alone):
        losses = [results(folder.trial(name))["eval_loss"] for folder in (alone, joint, measured)]
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_deal_the_trials_out(place, tmp_path):
    section = {"grid": {"training.learning_rate": RATES, "training.seed": [1, 2]}}
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", section)
    assert main(["sweep", str(file), "--gpus", "2"]) == 0
    assert set(statuses(SweepFolder(tmp_path / "sweep")).values()) == {"finished"}


# In Python


def test_a_sweep_in_python(place, tmp_path):
    given = sections(place, tmp_path / "sweep", {})
    del given["sweep"]
    found = lsr_scale.sweep(
        given, {"grid": {"training.learning_rate": RATES}}, {"training.max_steps": 2}, together=1, quiet=True
    )
    assert [trial.name for trial in found] == ["lr=0.002", "lr=0.005"]
    assert {trial.status for trial in found} == {"finished"}
    best = found.best()
    assert best.results["eval_loss"] == min(trial.results["eval_loss"] for trial in found) == best.score
    assert found.best("final_loss").results["final_loss"] == min(trial.results["final_loss"] for trial in found)
    with pytest.raises(UserError, match=r"^metric: no finished trial has 'eval_los'; did you mean 'eval_loss'"):
        found.best("eval_los")
    model, _ = lsr_scale.load_model(best.folder)
    assert model.peft_config
    frame = found.frame()
    assert list(frame["trial"]) == ["lr=0.002", "lr=0.005"]
    assert list(frame["training.learning_rate"]) == RATES
    assert list(frame["eval_loss"]) == [trial.results["eval_loss"] for trial in found]


def test_a_frame_needs_pandas(done, monkeypatch):
    from lsr_scale.sweeping.results import read_results

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="frame: needs pandas: pip install pandas"):
        read_results(done).frame()


@pytest.mark.usefixtures("written_pages")
def test_without_pages_there_is_a_table_and_no_picture_until_they_are_asked_for(place, tmp_path, capsys):
    given = sections(place, tmp_path / "sweep", {"grid": {"training.seed": [1, 2]}, "together": 1}, max_steps=1)
    found = lsr_scale.sweep(given, pages=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"table: {tmp_path / 'sweep/sweep.md'}"
    assert [trial.status for trial in found] == ["finished"] * 2
    drawn = lambda: sorted(file.name for ending in ("png", "html") for file in found.folder.rglob(f"*.{ending}"))  # noqa: E731
    assert drawn() == []
    write_report(found[0].folder)  # as `lsr-scale report` does
    lsr_scale.sweep(given, resume="auto", quiet=True)
    assert drawn() == sorted(["losses.png", "scores.png", *["loss.png", "condition.png", "report.html"] * 2])
