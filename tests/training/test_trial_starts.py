"""Starts from the gradient of trials: computed once where they are the same, and then equal to the bit."""

from pathlib import Path

import pytest
import torch

from lsr_scale.model import load_base_for
from lsr_scale.model.share import share_base
from lsr_scale.run.folder import RunFolder
from lsr_scale.sweeping import together
from lsr_scale.sweeping.bases import Bases
from lsr_scale.sweeping.sweep import run_sweep
from lsr_scale.training import gradient_start, trial_starts
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.shared import Shared
from lsr_scale.training.trial_rows import TrialRows
from lsr_scale.training.trial_starts import Start, TrialStarts
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import completions, save_llama, tiny_run, write_rows
from tests.helpers.tiny_sweeps import sweep_place, tiny_sweep

START = {"init": "gradient", "init_rows": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = sweep_place(tmp_path_factory.mktemp("starts"))
    save_llama(folder / "other", hidden_size=64)
    write_rows(folder / "other.jsonl", completions(5))
    return folder


@pytest.fixture
def computed(monkeypatch):
    """Return a list with an element for each start that is computed."""
    starts, own = [], gradient_start._gradients

    def counting(*args):
        starts.append(args)
        return own(*args)

    monkeypatch.setattr(gradient_start, "_gradients", counting)
    return starts


def run_of(place, method="lsr", adapter=(), model=(), data=(), **training):
    own = {"separation_rank": 2} if method == "lsr" else {}
    return tiny_run(
        place,
        model={"quantization": "none", "dtype": "float32", **dict(model)},
        adapter={"method": method, "rank": 4, "target_modules": SEVEN_LINEARS, **own, **START, **dict(adapter)},
        data={"train": [str(place / "rows.jsonl")], **dict(data)},
        training={"output_dir": str(place / "out"), **training},
        eval={"tasks": []},
    )


def start_of(run, starts):
    """Return the factors that a run begins with, and what it says of them."""
    said = []
    base = load_base_for(run.model, run.training["seed"])
    shared = Shared(base=lambda run: share_base(base), starts=starts)
    trainer = build_trainer(run, RunFolder(Path(run.training["output_dir"])), say=said.append, shared=shared)
    factors = {name: one.detach() for name, one in trainer.model.named_parameters() if one.requires_grad}
    return factors, [line for line in said if line.startswith("adapters start from")]


@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_trials_that_differ_in_how_they_train_have_one_start(place, computed, method):
    starts, first = TrialStarts(), run_of(place, method)
    expected, said = start_of(first, starts)
    assert len(computed) == 1
    others = [
        run_of(place, method, learning_rate=0.1, weight_decay=0.1),
        run_of(place, method, adapter={"alpha": 3.0}),
        run_of(place, method, optim="lora_rite", per_device_train_batch_size=1),
    ]
    for run in others:
        found, line = start_of(run, starts)
        assert found.keys() == expected.keys()
        assert all(torch.equal(one, expected[name]) for name, one in found.items())
        assert line == [f"{said[0]}: computed for an earlier trial"]
    assert len(computed) == 1
    fresh, line = start_of(others[0], None)
    assert line == said
    assert all(torch.equal(one, expected[name]) for name, one in fresh.items())


def test_what_a_start_is_made_of_tells_trials_apart(place, computed):
    starts = TrialStarts()
    others = [
        {"seed": 7},
        {"adapter": {"rank": 2}},
        {"adapter": {"separation_rank": 3}},
        {"adapter": {"init_rows": 4}},
        {"adapter": {"target_modules": ["q_proj"]}},
        {"data": {"train": [str(place / "other.jsonl")]}},
        {"model": {"name": str(place / "other")}},
        {"max_length": 9},
        {"method": "lora"},
    ]
    start_of(run_of(place), starts)
    for number, changes in enumerate(others, 2):
        start_of(run_of(place, **changes), starts)
        assert len(computed) == number, changes


def test_the_last_ones_are_kept(monkeypatch):
    monkeypatch.setattr(trial_starts, "MOST", 2)
    starts, made = TrialStarts(), {name: Start({}, name) for name in "abc"}
    for name in "ab":
        starts.keep(name, made[name])
    assert starts.of("a") is made["a"]
    starts.keep("c", made["c"])
    assert [starts.of(name) for name in "abc"] == [made["a"], None, made["c"]]


def adapter_of_sweep(place):
    return run_of(place).adapter.model_dump()


@pytest.mark.parametrize("number", [1, 2])
def test_a_sweep_computes_a_start_once(place, tmp_path, computed, number):
    grid = {"training.learning_rate": [1e-3, 2e-3, 4e-3], "adapter": [adapter_of_sweep(place)]}
    sweep = tiny_sweep(place, tmp_path / "sweep", {"grid": grid, "together": number}, max_steps=1)
    folder = run_sweep(sweep, "run", quiet=True)
    assert {trial.status for trial in folder.read().trials.values()} == {"finished"}
    assert len(computed) == 1


def test_steps_are_measured_without_a_start(place, tmp_path, monkeypatch, computed):
    grid = {"training.learning_rate": [1e-3, 2e-3], "adapter": [adapter_of_sweep(place)]}
    given = tiny_sweep(place, tmp_path / "sweep", {"grid": grid})
    assert all(trial.run.adapter.options["init"] == "gradient" for trial in given.trials)
    monkeypatch.setattr(together, "_joint_seconds", lambda *_: 1.0)
    bases, rows = Bases(), TrialRows()
    first = together._first_batches(given.trials[0], bases, rows)
    assert set(dict(together._times(given.trials, bases, rows, 2, first))) == {1, 2}
    assert computed == []
