"""Where a sweep begins: in a folder of its own, anew, or where an earlier one ended."""

from pathlib import Path

import pytest

from lsr_scale import UserError
from lsr_scale.config.trials import sweep_from_dict
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


def test_trials_may_be_added_at_the_end_of_a_list():
    folder, _ = begin(sweep(), "mine", None, False)
    finish(folder, "a")
    more = sweep({"list": [*LIST, {"name": "c", "training.seed": 3}], "together": 2})
    _, notes = begin(more, "mine", "auto", False)
    assert notes == ["added to the sweep: 1 trials"]
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


def test_resume_is_auto_and_goes_without_overwrite():
    with pytest.raises(UserError, match="a sweep resumes each trial from its newest checkpoint; give --resume auto"):
        begin(sweep(), "mine", "runs/x/checkpoint-3", False)
    with pytest.raises(UserError, match="give one of them"):
        begin(sweep(), "mine", "auto", True)
    assert not Path("runs").exists()
