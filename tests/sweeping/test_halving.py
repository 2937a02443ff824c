"""Successive halving: who goes on at each rung of steps."""

import math

import pytest

from lsr_scale.sweeping.folder import SweepState, TrialState
from lsr_scale.sweeping.halving import compare, kept, lower_is_better


@pytest.mark.parametrize(
    ("scores", "keep", "lower", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0], 0.5, True, {1, 2}),
        ([3.0, 1.0, 2.0, 4.0], 0.5, False, {0, 3}),
        ([3.0, 1.0, 2.0], 0.5, True, {1, 2}),  # rounded up
        ([3.0, 1.0, 2.0], 0.01, True, {1}),
        ([2.0, 2.0, 2.0, 2.0], 0.5, True, {0, 1}),  # equal ones: the first
        ([math.nan, 5.0, None, 6.0], 0.75, True, {1, 3}),  # nothing is no score
        ([None, math.nan], 0.5, True, set()),
        ([0.1] * 10, 0.7, True, set(range(7))),  # 0.7 * 10 is a little above 7
    ],
)
def test_the_best_share_is_kept(scores, keep, lower, best):
    assert kept(scores, keep, lower) == best


def test_losses_are_better_where_they_are_lower():
    assert lower_is_better("eval_loss")
    assert not lower_is_better("eval_accuracy")


def state_of(*trials, after=0.2, keep=0.5):
    stop = {"metric": "eval_loss", "after": after, "keep": keep}
    return SweepState({}, {"stop": stop}, "eval_loss", {trial.name: trial for trial in trials})


def paused(name, rung, *scores):
    return TrialState(name, {}, "paused", rung, list(scores))


def statuses(state):
    return {trial.name: (trial.status, trial.rung) for trial in state.trials.values()}


def test_nothing_is_decided_before_all_have_come():
    for status in ("pending", "running"):
        state = state_of(paused("a", 0, 1.0), TrialState("b", {}, status))
        assert compare(state) == []
        assert statuses(state) == {"a": ("paused", 0), "b": (status, 0)}


def test_the_best_go_on_and_the_others_are_stopped():
    state = state_of(*(paused(name, 0, score) for name, score in zip("abcd", (4.0, 2.0, 1.0, 3.0), strict=True)))
    assert [trial.name for trial in compare(state)] == ["a", "d"]
    assert statuses(state) == {"a": ("stopped", 0), "b": ("pending", 1), "c": ("pending", 1), "d": ("stopped", 0)}
    state.trials["b"] = paused("b", 1, 2.0, 0.5)
    assert compare(state) == []
    state.trials["c"] = paused("c", 1, 1.0, 0.6)
    assert [trial.name for trial in compare(state)] == ["c"]
    assert statuses(state)["b"] == ("pending", 2)


def test_what_diverged_or_failed_is_the_worst_and_what_finished_counts_with_what_it_had():
    finished = TrialState("done", {}, "finished", score=0.5)
    state = state_of(
        paused("a", 0, 2.0),
        paused("b", 0, 1.0),
        TrialState("c", {}, "diverged"),
        TrialState("d", {}, "failed"),
        finished,
    )
    compare(state)  # three of five
    assert statuses(state)["a"] == statuses(state)["b"] == ("pending", 1)
    state = state_of(paused("a", 0, 2.0), paused("b", 0, 1.0), finished)
    compare(state)  # two of three, one of which is done
    assert (statuses(state)["a"], statuses(state)["b"]) == (("stopped", 0), ("pending", 1))


def test_a_trial_that_was_added_is_compared_with_those_before_it():
    state = state_of(paused("a", 0, 2.0), paused("b", 0, 1.0))
    compare(state)
    state.trials["b"].status = "running"
    for score, outcome in ((0.5, ("pending", 1)), (3.0, ("stopped", 0))):
        state.trials["new"] = paused("new", 0, score)
        compare(state)
        assert statuses(state)["new"] == outcome
    assert statuses(state)["a"] == ("stopped", 0)
    assert statuses(state)["b"] == ("running", 1)


def test_without_stop_nothing_is_compared():
    state = SweepState({}, {"stop": None}, "eval_loss", {"a": paused("a", 0, 1.0)})
    assert compare(state) == []
