"""Where a sweep begins: in a folder of its own, anew, or where an earlier one ended."""

from pathlib import Path

import pytest

from lsr_scale import UserError
from lsr_scale.config.trials import sweep_from_dict
from lsr_scale.run.start import starting
from lsr_scale.sweeping.folder import SweepFolder, Worker
from lsr_scale.sweeping.start import begin

RUN = {"model": {"name": "some/model"}, "adapter": {"method": "lsr"}, "data": {"train": ["builtin:chat"]}}
LIST = [{"name": "a", "training.seed": 1}, {"name": "b", "training.seed": 2}]


def sweep(section=None, **changes):
    return sweep_from_dict({**RUN, **changes, "sweep": section or {"list": LIST}})


def finish(folder, name):
    with folder.updating() as state:
        state.trials[name].status, state.trials[name].score = "finished", 1.0


def statuses(folder):
    return {trial.name: trial.status for trial in folder.read().trials.values()}


def test_folders_are_numbered_and_the_newest_sweep_goes_on():
    assert [begin(sweep(), "mine", None, False)[0].path for _ in range(2)] == [
        Path("runs/mine-sweep"),
        Path("runs/mine-sweep-2"),
    ]
    finish(SweepFolder(Path("runs/mine-sweep-2")), "a")
    folder, notes = begin(sweep(), "mine", "auto", False)
    assert (folder.path, notes) == (Path("runs/mine-sweep-2"), [])
    assert statuses(folder) == {"a": "finished", "b": "pending"}


def test_nothing_to_resume_begins():
    folder, _ = begin(sweep(training={"output_dir": "here"}), "mine", "auto", False)
    assert statuses(folder) == {"a": "pending", "b": "pending"}


def test_a_folder_that_holds_a_sweep_is_not_written_over_unless_asked_for():
    here = sweep(training={"output_dir": "here"})
    folder, _ = begin(here, "mine", None, False)
    finish(folder, "a")
    with pytest.raises(UserError, match=r"^here: holds a sweep already; --resume auto continues it, --overwrite"):
        begin(here, "mine", None, False)
    assert statuses(folder)["a"] == "finished"
    other = sweep({"list": LIST[1:]}, training={"output_dir": "here"})
    _, notes = begin(other, "mine", None, True)
    assert notes == ["left in trials/, of the earlier sweep: a"]
    assert statuses(folder) == {"b": "pending"}


def test_a_sweep_under_way_is_not_written_over():
    here = sweep(training={"output_dir": "here"})
    folder, _ = begin(here, "mine", None, False)
    with Worker(folder).joined(), pytest.raises(UserError, match=r"^here: a sweep is under way here"):
        begin(here, "mine", None, True)


def test_what_no_sweep_wrote_is_not_written_over():
    Path("here/trials").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^here: holds trials, which no sweep wrote and this one would write over"):
        begin(sweep(training={"output_dir": "here"}), "mine", None, True)
    Path("run").mkdir()
    Path("run/env.json").write_text('{"lsr_scale": "1"}')
    with pytest.raises(UserError, match=r"^run: holds a run, and a sweep has a folder of its own; go elsewhere"):
        begin(sweep(training={"output_dir": "run"}), "mine", None, False)
    assert sorted(path.name for path in Path("run").iterdir()) == ["env.json"]


@pytest.mark.parametrize("how", [{}, {"resume": "auto"}, {"overwrite": True}])
def test_a_run_does_not_write_into_a_sweeps_folder(how):
    begin(sweep(training={"output_dir": "here"}), "mine", None, False)
    run = sweep(training={"output_dir": "here"}).trials[0].run
    with (
        pytest.raises(UserError, match=r"^here: holds a sweep, and a run has a folder of its own; go elsewhere"),
        starting(run, "mine", how.get("resume"), "overwrite" in how),
    ):
        pass


def test_trials_may_be_added_at_the_end_of_a_list():
    folder, _ = begin(sweep(), "mine", None, False)
    finish(folder, "a")
    more = sweep({"list": [*LIST, {"name": "c", "training.seed": 3}], "together": 2})
    _, notes = begin(more, "mine", "auto", False)
    assert notes == ["added to the sweep: 1 trial"]
    assert statuses(folder) == {"a": "finished", "b": "pending", "c": "pending"}


@pytest.mark.parametrize(
    ("section", "changes", "difference"),
    [
        ({"list": LIST[:1]}, {}, r"list\.1: \{'name': 'b'.*\} -> None"),
        ({"list": [LIST[0], {"name": "b", "training.seed": 5}]}, {}, r"list\.1\.training\.seed: 2 -> 5"),
        ({"list": LIST, "grid": {"adapter.rank": [4]}}, {}, r"sweep\.grid\.adapter\.rank: None -> \[4\]"),
        ({"grid": {"training.seed": [1, 2]}}, {}, r"sweep\.grid\.training\.seed: None -> \[1, 2\]"),
        (None, {"adapter": {"method": "lora"}}, r"adapter\.method: 'lsr' -> 'lora'"),
        (None, {"training": {"num_train_epochs": 9}}, r"training\.num_train_epochs: None -> 9"),
    ],
)
def test_another_sweep_is_refused_with_the_difference(section, changes, difference):
    folder, _ = begin(sweep(), "mine", None, False)
    before = folder.state.read_bytes()
    with pytest.raises(UserError, match=rf"its sweep was another one, so .*{difference}.*; put that back"):
        begin(sweep(section, **changes), "mine", "auto", False)
    assert folder.state.read_bytes() == before


DPO = {"training": {"method": "dpo"}, "data": {"train": ["pairs.jsonl"], "validation_split": 0.1}}
OTHER_BETA = {"list": [*LIST, {"name": "c", "training.beta": 0.5}]}


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)


def scored(folder):
    return {trial.name: trial.score for trial in folder.read().trials.values()}


def finish_with(folder, name, score, **results):
    with folder.updating() as state:
        trial = state.trials[name]
        trial.status, trial.score, trial.results = "finished", score, results


@pytest.mark.usefixtures("pairs")
def test_scores_are_those_of_the_metric_that_added_trials_bring():
    folder, _ = begin(sweep(**DPO), "mine", None, False)
    finish_with(folder, "a", 0.7, eval_loss=0.7)
    own = folder.trial("a")
    own.path.mkdir(parents=True)
    own.results.write_text('{"eval_loss": 0.7, "eval_rewards/accuracies": 0.9, "accuracy": {}}')
    finish_with(folder, "b", 0.5, **{"eval_loss": 0.5, "eval_rewards/accuracies": 0.6})  # whose folder was removed
    _, notes = begin(sweep(OTHER_BETA, **DPO), "mine", "auto", False)
    assert folder.read().scored_by == "eval_rewards/accuracies"
    assert scored(folder) == {"a": 0.9, "b": 0.6, "c": None}
    assert [trial.name for trial in folder.read().ranked()] == ["a", "b", "c"]
    assert notes == [
        "added to the sweep: 1 trial",
        "trials are compared by eval reward accuracy now, no longer by eval loss: those that ended have that of their "
        "results",
    ]


@pytest.mark.usefixtures("pairs")
def test_what_has_no_value_of_the_new_metric_has_no_score():
    folder, _ = begin(sweep(**DPO), "mine", None, False)
    finish_with(folder, "a", 0.7, eval_loss=0.7)
    _, notes = begin(sweep(OTHER_BETA, **DPO), "mine", "auto", False)
    assert scored(folder) == {"a": None, "b": None, "c": None}
    assert notes[-1] == "their results have no eval reward accuracy: a"


@pytest.mark.usefixtures("pairs")
def test_rungs_compare_what_they_did_when_the_sweep_began():
    held_out = {"train": ["builtin:chat"], "validation_split": 0.1}
    run = {"training": {"method": "grpo", "reward": ["exact_answer"]}, "data": held_out}
    section = {"list": LIST, "stop": {"after": 0.3}}
    folder, _ = begin(sweep({**section, "stop": {"after": 0.3, "metric": "eval_loss"}}, **run), "mine", None, False)
    finish_with(folder, "a", 0.7)
    _, notes = begin(sweep(section, **run), "mine", "auto", False)
    state = folder.read()
    assert (state.scored_by, state.sweep["stop"]["metric"], notes) == ("eval_loss", "eval_loss", [])
    assert state.trials["a"].score == 0.7
    with pytest.raises(UserError, match=r"sweep\.stop\.metric: 'eval_loss' -> 'eval_reward'; put that back"):
        begin(sweep({**section, "stop": {"after": 0.3, "metric": "eval_reward"}}, **run), "mine", "auto", False)


@pytest.mark.usefixtures("pairs")
def test_an_added_trial_that_rungs_cannot_compare_is_refused():
    folder, _ = begin(sweep({"list": LIST, "stop": {}}, **DPO), "mine", None, False)
    before = folder.state.read_bytes()
    with pytest.raises(UserError, match=r"compared by eval_loss since it began, and they differ in training\.beta now"):
        begin(sweep({**OTHER_BETA, "stop": {}}, **DPO), "mine", "auto", False)
    assert folder.state.read_bytes() == before


def test_resume_is_auto_and_goes_without_overwrite():
    with pytest.raises(UserError, match="a sweep resumes each trial from its newest checkpoint; give --resume auto"):
        begin(sweep(), "mine", "runs/x/checkpoint-3", False)
    with pytest.raises(UserError, match="give one of them"):
        begin(sweep(), "mine", "auto", True)
    assert not Path("runs").exists()
