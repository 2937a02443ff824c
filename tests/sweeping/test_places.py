"""Turns of runs that meet: their order, free places, what ends or raises when, and what is kept by run."""

import functools
import os
import random
import signal
import threading
import time
from typing import Any

import numpy
import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from transformers import set_seed

from lsr_scale import UserError
from lsr_scale.sweeping.places import Places
from lsr_scale.training.callbacks.signals import Signals
from lsr_scale.training.steps.joint import Member


class Steps:
    """Counts joint steps, and returns a loss for each member; raises what it is told to."""

    def __init__(self, errors=()):
        self.calls, self.errors = [], list(errors)

    def __call__(self, members):
        names = [member.inputs["name"] for member in members]
        self.calls.append(names)
        for member in members:
            member.model.weight.grad = torch.ones_like(member.model.weight)
        for when, error in self.errors:
            if when(names):
                raise error
        return [torch.tensor(float(member.divisor)) for member in members]


def member(name, divisor=1, model=None):
    small: Any = model or nn.Linear(1, 1)
    return Member(small, {"name": name}, divisor)


def meeting(name, steps, log=None, then=lambda: None):
    """Return a run that meets the others in so many steps."""
    model = nn.Linear(1, 1)

    def start(meet):
        for number in range(steps):
            if log is not None:
                log.append((name, number))
            assert model.weight.grad is None
            assert float(meet(member(name, number, model))) == number
            assert model.weight.grad is not None
            model.weight.grad = None
        then()
        return name

    return start


def work(step, starts, size, ended=None, **options):
    """Do runs; return how they ended, in the order in which they did."""
    found = []
    threads = threading.active_count()
    try:
        Places(step, size, **options).work(functools.partial(next, iter(starts), None), ended or found.append)
    finally:
        assert threading.active_count() == threads, "no thread is left"
    return found


def raising(error):
    def then():
        raise error

    return then


def test_runs_go_round_and_free_places_are_filled():
    step, log = Steps(), []
    starts = [meeting(name, number, log) for name, number in (("a", 1), ("b", 3), ("c", 2), ("d", 0), ("e", 1))]
    found = work(step, starts, 2)
    assert step.calls == [["a", "b"], ["c", "b"], ["c", "b"], ["e"]]
    assert [end.value for end in found] == ["a", "c", "b", "d", "e"]
    assert log == [("a", 0), ("b", 0), ("b", 1), ("c", 0), ("c", 1), ("b", 2), ("e", 0)]


def test_what_a_run_raises_ends_it_alone():
    bad = UserError("training diverged")
    step = Steps()
    found = work(step, [meeting("a", 1, then=raising(bad)), meeting("b", 3)], 2)
    assert [(end.value, end.error) for end in found] == [(None, bad), ("b", None)]
    assert step.calls == [["a", "b"], ["b"], ["b"]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_no_error_of_a_run_is_one_of_the_others(error):
    found = work(Steps(), [meeting("a", 1, then=raising(error)), meeting("b", 2)], 2)
    assert [end.error for end in found] == [error, None]


def test_what_comes_next_may_depend_on_how_runs_ended():
    waiting, found = [], []

    def next_start():
        return waiting.pop(0) if waiting else None

    def ended(end):
        found.append(end.value)
        if end.value == "a":
            waiting.extend([meeting("c", 1), meeting("d", 1)])

    waiting += [meeting("a", 2), meeting("b", 4)]
    step = Steps()
    Places(step, 2).work(next_start, ended)
    assert found == ["a", "c", "d", "b"]
    assert step.calls == [["a", "b"], ["a", "b"], ["c", "b"], ["d", "b"]]


def test_out_of_memory_halves_who_shares_a_step():
    step = Steps([(lambda names: len(names) > 2, torch.OutOfMemoryError("CUDA out of memory"))])
    starts = [meeting(name, 2) for name in "abcde"]
    found = work(step, starts, 5)
    assert sorted(end.value for end in found) == list("abcde")
    assert step.calls[:4] == [list("abcde"), ["a", "b"], ["c", "d"], ["e"]]
    assert all(len(names) <= 2 for names in step.calls[1:])


def test_what_cannot_be_joined_is_computed_alone_and_fails_alone():
    bug = RuntimeError("a shape")
    step = Steps([(lambda names: "b" in names, bug)])
    found = work(step, [meeting(name, 2) for name in "abc"], 3)
    assert {end.value: end.error for end in found} == {"a": None, None: bug, "c": None}
    assert step.calls[:4] == [["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_whoever_runs_them_decides_what_follows_a_failed_step():
    told = []

    def failed(error, together):
        told.append((str(error), together))
        return 3

    step = Steps([(lambda names: len(names) > 3, ValueError("too many"))])
    work(step, [meeting(name, 1) for name in "abcdef"], 6, failed=failed)
    assert told == [("too many", 6)]
    assert step.calls == [list("abcdef"), ["a", "b", "c"], ["d", "e", "f"]]


def test_a_decision_that_raises_ends_all(capfd):
    ends = []
    step = Steps([(lambda names: True, ValueError("enough"))])

    def closing(name):
        inner = meeting(name, 2)

        def start(meet):
            try:
                return inner(meet)
            except KeyboardInterrupt:
                ends.append(name)
                raise

        return start

    def failed(error, together):
        raise error

    with pytest.raises(ValueError, match="enough"):
        work(step, [closing("a"), closing("b")], 2, failed=failed)
    assert ends == ["a", "b"]


def random_numbers():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def seeded(seed, found):
    def start(meet):
        set_seed(seed)
        for _ in range(3):
            found.append((seed, random_numbers()))
            meet(member(seed))

    return start


def test_random_numbers_are_each_runs_own_and_the_process_keeps_its():
    alone = []
    for seed in (1, 2, 3):
        set_seed(seed)
        drawn = []
        for _ in range(3):
            drawn.append((seed, random_numbers()))
            nn.Linear(1, 1)  # draws its weights
        alone += drawn
    set_seed(0)
    expected = random_numbers()
    set_seed(0)
    together = []

    def step(members):
        random_numbers()  # what a joint step draws is nobody's
        return Steps()(members)

    work(step, [seeded(seed, together) for seed in (1, 2, 3)], 3)
    assert sorted(together) == sorted(alone)
    assert random_numbers() == expected


def test_accelerates_state_is_each_runs_own():
    found = []

    def start(syncs):
        def run(meet):
            state = GradientState()
            state._set_sync_gradients(syncs)
            loader = nn.Identity()
            state._add_dataloader(loader)
            for _ in range(2):
                meet(member(""))
                found.append((syncs, state.sync_gradients, len(state.dataloader_references)))

        return run

    GradientState()._set_sync_gradients(True)
    before = list(GradientState().dataloader_references)  # of a run that failed in this process, say
    work(Steps(), [start(True), start(False)], 2)
    assert found == [(True, True, 2), (False, False, 2)] * 2
    assert GradientState().sync_gradients
    assert GradientState().dataloader_references == before


def test_grad_mode_and_context_are_those_of_a_fresh_thread_and_this_one():
    seen = []

    def start(meet):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), numpy.geterr()["divide"]))

    with numpy.errstate(divide="raise"), torch.no_grad():
        work(Steps(), [start], 1)
    assert seen == [(True, False, "raise")]


def test_after_a_signal_nothing_is_started():
    signals = Signals()

    def received():
        os.kill(os.getpid(), signal.SIGTERM)
        while not signals.received:
            time.sleep(0.001)

    with signals.listening():
        starts = [meeting("a", 1, then=received), meeting("b", 3), meeting("c", 1)]
        found = work(Steps(), starts, 2, signals=signals)
    assert signals.received == signal.SIGTERM
    assert [end.value for end in found] == ["a", "b"]


def interrupted(name, log, then):
    def start(meet):
        try:
            meet(member(name))
            then()
            meet(member(name))
            meet(member(name))
        finally:
            log.append(name)

    return start


@pytest.mark.parametrize("where", ["in a run", "in a joint step", "between"])
def test_ctrl_c_ends_every_run_where_it_is(where):
    log = []
    runs = threading.Event()

    def endless():
        if where == "in a run":
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # until it is interrupted
                runs.wait(0.001)

    class Interrupted(Steps):
        def __call__(self, members):
            losses = super().__call__(members)
            if where == "in a joint step" and len(self.calls) == 2:
                raise KeyboardInterrupt
            return losses

    def next_start():
        if starts:
            return starts.pop(0)
        if where == "between" and log:
            raise KeyboardInterrupt
        return None

    starts: list[Any] = [interrupted("a", log, lambda: None), interrupted("b", log, endless)]
    starts.append(meeting("c", 1, then=lambda: log.append("c")))
    threads = threading.active_count()
    places = Places(Interrupted(), 3)
    with pytest.raises(KeyboardInterrupt):
        places.work(next_start, lambda end: None)
    assert sorted(log) == (["a", "b"] if where == "in a run" else ["a", "b", "c"])
    assert threading.active_count() == threads
    assert places._turn is None
