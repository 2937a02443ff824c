"""Rows of trials: read and tokenized once where they are the same ones, by all that makes them."""

from pathlib import Path
from typing import Any

import pytest

from lsr_scale import UserError
from lsr_scale.config import run_from_dict
from lsr_scale.config.alike import memory_key, rows_key
from lsr_scale.model import load_base_for
from lsr_scale.model.share import share_base
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import trial_rows
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.run_data import read_data
from lsr_scale.training.shared import Shared
from lsr_scale.training.trial_rows import TrialRows
from tests.helpers.tiny_sweeps import sections, sweep_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return sweep_place(tmp_path_factory.mktemp("rows"))


def run_of(place, **changes):
    given = sections(place, place / "out", {}, **changes.pop("training", {}))
    del given["sweep"]
    for name, section in changes.items():
        given[name] = {**given[name], **section}
    return run_from_dict(given)


@pytest.fixture
def read(monkeypatch):
    """Return the runs whose rows were read."""
    runs = []

    def reading(run, *rest):
        runs.append(run)
        return read_data(run, *rest)

    monkeypatch.setattr(trial_rows, "read_data", reading)
    return runs


def trainer_of(run, rows, base, said=None) -> Any:
    lines = [] if said is None else said
    data = rows.read(run, None, lines.append)
    shared = Shared(base=lambda run: share_base(base), rows=rows)
    return build_trainer(run, RunFolder(Path(run.training["output_dir"])), None, lines.append, data, shared=shared)


def test_what_trains_on_rows_differently_has_the_same_ones_and_what_makes_them_has_not(place):
    one = run_of(place)
    for same in ({"learning_rate": 0.5}, {"seed": 7}, {"num_train_epochs": 9}, {"weight_decay": 0.1}, {"max_steps": 3}):
        assert rows_key(run_of(place, training=same)) == rows_key(one), same
        assert memory_key(run_of(place, training=same)) == memory_key(one), same
    for other in ({"max_length": 7}, {"packing": True}, {"completion_only_loss": False}, {"eos_token": "x"}):
        assert rows_key(run_of(place, training=other)) != rows_key(one), other
    held_out = {"validation": [], "validation_split": 0.3}
    assert rows_key(run_of(place, data=held_out)) != rows_key(one)
    shuffled = [run_of(place, training={"shuffle_dataset": True, "seed": seed}) for seed in (1, 2)]
    assert rows_key(shuffled[0]) != rows_key(shuffled[1])
    assert rows_key(run_of(place, adapter={"rank": 3})) == rows_key(one)
    assert memory_key(run_of(place, adapter={"rank": 3})) != memory_key(one)


def test_equal_rows_are_read_and_tokenized_once(place, read):
    rows, runs = TrialRows(), [run_of(place, training={"learning_rate": rate}) for rate in (0.1, 0.2)]
    base = load_base_for(runs[0].model, 1)
    said = [[], []]
    first, second = (trainer_of(run, rows, base, lines) for run, lines in zip(runs, said, strict=True))
    assert len(read) == 1
    assert second.train_dataset is first.train_dataset
    assert second.eval_dataset is first.eval_dataset
    assert first.train_dataset.format["type"] == "numpy"
    assert second.token_counts == first.token_counts
    assert said[0] == said[1]
    alone: Any = build_trainer(runs[1], RunFolder(place / "out"))
    for mine, own in ((second.train_dataset, alone.train_dataset), (second.eval_dataset, alone.eval_dataset)):
        assert mine.column_names == own.column_names
        assert mine.with_format(None)[:] == own.with_format(None)[:]
    trainer_of(run_of(place, training={"max_length": 9}), rows, base)
    assert len(read) == 2, "rows of another length"


def test_the_tokenizer_is_as_a_run_alone_has_it_when_it_begins(place):
    rows, run = TrialRows(), run_of(place)
    trainer = trainer_of(run, rows, load_base_for(run.model, 1))
    tokenizer = trainer.processing_class
    fresh = tokenizer.backend_tokenizer.to_str()
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)  # as an evaluation may
    assert tokenizer.backend_tokenizer.to_str() != fresh
    assert rows.read(run).tokenizer.backend_tokenizer.to_str() == fresh


def test_what_fails_is_not_kept(place, read):
    rows, run = TrialRows(), run_of(place, data={"train": [str(place / "nothing.jsonl")]})
    for _ in range(2):
        with pytest.raises(UserError, match=r"nothing\.jsonl"):
            rows.read(run)
    assert len(read) == 2


def test_few_are_kept(place, read, monkeypatch):
    monkeypatch.setattr(trial_rows, "MOST", 1)
    rows, runs = TrialRows(), [run_of(place, training={"max_length": length}) for length in (9, 10)]
    base = load_base_for(runs[0].model, 1)
    for run in (*runs, runs[1], runs[0]):
        trainer_of(run, rows, base)
    assert [one.training["max_length"] for one in read] == [9, 10, 9]
