"""How many trials share a step: what is asked for, what cannot be, what fits, and what pays."""

import math
import re

import pytest
import torch

from lsr_scale.config.trials import sweep_from_dict
from lsr_scale.sweeping import together
from lsr_scale.sweeping.bases import Bases
from lsr_scale.sweeping.together import Choice, FirstBatches, choose
from lsr_scale.training.trial_rows import TrialRows
from tests.helpers.tiny_sweeps import sweep_place, tiny_sweep

RUN = {"model": {"name": "some/model"}, "adapter": {"method": "lsr"}, "data": {"train": ["a.jsonl"]}}


def sweep(num_trials: int, together: str | int = "auto", **changes):
    section = {"grid": {"training.seed": list(range(num_trials))}, "together": together}
    return sweep_from_dict({**RUN, **changes, "sweep": section})


class NoBase(Bases):
    """Nothing is loaded."""

    def of(self, run):
        return None


@pytest.fixture
def measured(monkeypatch):
    """Return a function that returns the choice for times (seconds a trial by number), None where memory ran out."""

    def measured(times, num_trials=8, fit=8, steps=1_000):
        def of_numbers(plans, bases, rows, most, first):
            assert (len(plans), most) == (num_trials, fit)
            yield from times.items()

        monkeypatch.setattr(together, "_times", of_numbers)
        monkeypatch.setattr(together, "_first_batches", lambda *_: FirstBatches([], None))
        monkeypatch.setattr(together, "_most_that_fit", lambda *_: fit)
        monkeypatch.setattr(together, "base_fallback_reason", lambda base: None)
        given = sweep(num_trials, training={"max_steps": steps})
        return choose(given, given.trials, NoBase(), TrialRows())

    return measured


@pytest.mark.parametrize(
    ("times", "number", "why"),
    [
        ({1: 0.1, 2: 0.06, 4: 0.04, 8: 0.03}, 8, "there are no more"),
        ({1: 0.1, 2: 0.06, 4: 0.058, 8: 0.059}, 2, "more are not 5 % faster"),
        ({1: 0.1, 2: 0.2, 4: 0.2}, 1, "more are not 5 % faster"),
        # two gain nothing, and eight do
        ({1: 0.0124, 2: 0.013, 4: 0.011, 8: 0.0095}, 8, "there are no more"),
        ({1: 0.1, 2: 0.06, 4: 0.058, 8: 0.05}, 8, "there are no more"),
        ({1: 0.1, 2: 0.06, 4: None}, 2, "4 do not fit"),
    ],
)
def test_as_many_share_a_step_as_pays(measured, times, number, why):
    choice = measured(times)
    assert choice.number == number
    assert re.search(rf"; {re.escape(why)} \(measured in \d+ s\)$", choice.why)
    assert f"{1000 * times[1]:.1f}" in choice.why


def test_what_fits_limits_them(measured):
    assert "; no more than 2 fit (" in measured({1: 0.1, 2: 0.05}, fit=2).why
    assert "; no more than 2 fit (" in measured({1: 0.1, 2: 0.2}, fit=2).why, "more may pay"


def test_as_many_fit_as_the_rows_take_not_as_the_longest_that_may_be(tmp_path, monkeypatch):
    place = sweep_place(tmp_path)
    planned, plan_of = [], together.plan_together
    monkeypatch.setattr(together, "plan_together", lambda given: (planned.append(given), plan_of(given))[1])
    of_a_batch = {"per_device_train_batch_size": 4, "max_length": None}
    found = []
    for number, changes in enumerate(({}, {"max_length": 1024}, {"max_length": 24}, {"padding_free": True})):
        given = tiny_sweep(place, tmp_path / str(number), {"grid": {"adapter.rank": [2, 3]}}, **of_a_batch | changes)
        rows = TrialRows()
        together._most_that_fit(given, given.trials, together._first_batches(given.trials[0], Bases(), rows))
        lengths = sorted(map(len, rows.read(given.trials[0].run).made.tokenized["train"]["input_ids"]))
        found.append((lengths, *{trial.run.training["max_length"] for trial in planned[-1].trials}))
        assert {trial.run.training["max_length"] for trial in given.trials} == {(of_a_batch | changes)["max_length"]}
    (lengths, longest), (_, limited), (_, cut), (_, joined) = found
    assert longest == limited == lengths[-1] < 1024
    assert cut == 24
    assert joined == math.ceil(sum(lengths[-4:]) / 4) < longest, "joined rows are not padded to the longest"


@pytest.mark.parametrize("joined", [True, False])
def test_a_batch_of_more_rows_than_there_are_has_no_more_tokens_than_is_reckoned_with(tmp_path, joined):
    place = sweep_place(tmp_path)
    options = {"per_device_train_batch_size": 40, "max_length": None, "padding_free": joined}
    given = tiny_sweep(place, tmp_path / "sweep", {"grid": {"adapter.rank": [2, 3]}}, **options)
    rows = TrialRows()
    first = together._first_batches(given.trials[0], Bases(), rows)
    assert len(rows.read(given.trials[0].run).train) < 40
    tokens = max(batch["input_ids"].numel() for batch in first.batches)
    assert first.most_tokens is not None
    assert tokens <= first.most_tokens <= 1.5 * tokens


@pytest.mark.parametrize(("fit", "number"), [(3, 3), (32, 8)])
def test_nothing_is_measured_where_that_would_take_a_large_part_of_the_sweep(measured, fit, number):
    choice = measured({}, num_trials=40, fit=fit, steps=1)
    assert choice.number == number
    assert choice.why.endswith("and all take 40")


def test_a_first_trial_that_cannot_be_trained_ends_nothing(monkeypatch):
    monkeypatch.setattr(together, "_most_that_fit", lambda *_: 3)
    monkeypatch.setattr(together, "base_fallback_reason", lambda base: None)
    given = sweep(4, data={"train": ["nothing.jsonl"]})
    choice = choose(given, given.trials, NoBase(), TrialRows())
    assert choice.number == 3
    assert "nothing was measured, as seed=0 cannot be trained: " in choice.why
    assert "nothing.jsonl" in choice.why


def test_a_trial_alone_is_its_own_trainers_step(tmp_path, monkeypatch):
    place = sweep_place(tmp_path)
    given = tiny_sweep(place, tmp_path / "sweep", {"grid": {"adapter.rank": [2, 3]}}, learning_rate=1e6)
    met = []
    monkeypatch.setattr(together, "_joint_seconds", lambda step, models, *_: met.append(len(models)) or 1.0)
    bases, rows = Bases(), TrialRows()
    found = dict(together._times(given.trials, bases, rows, 2, together._first_batches(given.trials[0], bases, rows)))
    assert met == [2], "no joint step of one"
    assert found[1] is not None


def test_a_number_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(together, "base_fallback_reason", lambda base: None)
    given = sweep(3, 2)
    assert choose(given, given.trials, NoBase(), TrialRows()) == Choice(2, "")
    given = sweep(3, 16)
    assert choose(given, given.trials, NoBase(), TrialRows()) == Choice(3, "")
    given = sweep(3, 1)
    assert choose(given, given.trials, Bases(), TrialRows()) == Choice(1, ""), "and no base is looked at"


def test_many_that_share_no_step_are_counted(monkeypatch):
    monkeypatch.setattr(together, "base_fallback_reason", lambda base: None)
    section = {"grid": {"adapter.dropout": [0, 0.1], "training.seed": list(range(6))}, "together": 16}
    given = sweep_from_dict({**RUN, "sweep": section})
    choice = choose(given, given.trials, NoBase(), TrialRows())
    assert choice.number == 6
    named = ", ".join(f"dropout=0.1,seed={seed}" for seed in range(3))
    assert choice.why.startswith(f"trained alone, as they share no step: {named} and 3 more (adapter.dropout")


def test_a_reason_not_to_share_is_said():
    given = sweep(2, adapter={"method": "lora", "dropout": 0.1})
    choice = choose(given, given.trials, NoBase(), TrialRows())
    assert choice.number == 1
    assert "they cannot share steps: adapter.dropout" in choice.why


def test_numbers_of_trials_are_measured_on_the_real_base(tmp_path):
    place = sweep_place(tmp_path)
    given = tiny_sweep(place, tmp_path / "sweep", {"grid": {"adapter.rank": [2, 3, 4]}})
    bases = Bases()
    base = bases.of(given.trials[0].run)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    rows = TrialRows()
    found = dict(together._times(given.trials, bases, rows, 3, together._first_batches(given.trials[0], bases, rows)))
    assert list(found) == [1, 2, 3]
    assert all(seconds is not None and seconds > 0 for seconds in found.values())
    assert bases.of(given.trials[1].run) is base
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert all(parameter.grad is None for parameter in base.parameters())
