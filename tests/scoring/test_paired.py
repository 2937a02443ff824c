"""Intervals and tests of paired answers, against other ways to the same numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from lsr_scale.scoring.paired import mcnemar_p, paired_accuracy, paired_bootstrap, wilson


@pytest.mark.parametrize(("right", "num"), [(0, 7), (7, 7), (3, 10), (480, 1000), (1, 1)])
def test_a_share_s_interval_is_scipy_s(right, num):
    expected = stats.binomtest(right, num).proportion_ci(method="wilson")
    assert wilson(right, num) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (36, 7), (200, 180)])
def test_p_is_the_binomial_test_s(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_p(gained, lost) == pytest.approx(expected)


def test_a_paired_difference_by_hand():
    first = [True] * 4 + [False] * 6
    second = [True, True, True, False] + [True] * 3 + [False] * 3
    paired = paired_accuracy(first, second)
    assert (paired.common, paired.gained, paired.lost) == (10, 3, 1)
    assert paired.difference == pytest.approx(0.2)
    # Agresti and Min: (c - b) / (n + 2) -+ z sqrt(b + c + 1 - (c - b)^2 / (n + 2)) / (n + 2)
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert (paired.low, paired.high) == pytest.approx((2 / 12 - half, 2 / 12 + half))


def test_two_runs_that_answer_alike_still_have_an_interval():
    paired = paired_accuracy([True, False] * 5, [True, False] * 5)
    assert paired.difference == 0
    assert paired.low < -0.05 < 0.05 < paired.high
    assert paired.p == 1


@pytest.mark.parametrize("num", [20, 100])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(num):
    draw = np.random.default_rng(0)
    gain, loss = 0.2, 0.1
    cells = draw.multinomial(num, [gain, loss, 1 - gain - loss], size=400)
    held = 0
    for gained, lost, same in cells:
        second = [True] * gained + [False] * lost + [True] * same
        paired = paired_accuracy([False] * gained + [True] * lost + [True] * same, second)
        held += paired.low <= gain - loss <= paired.high
    assert 0.925 <= held / 400 <= 0.99


def test_resampling_agrees_with_the_closed_form_and_with_itself():
    draw = np.random.default_rng(1)
    first, second = draw.random(300) < 0.5, draw.random(300) < 0.6
    closed = paired_accuracy(list(first), list(second))

    def measure(index):
        return float(first[index].mean()), float(second[index].mean())

    resampled = paired_bootstrap(measure, 300)
    assert resampled == paired_bootstrap(measure, 300)
    assert resampled.difference == pytest.approx(closed.difference)
    assert (resampled.low, resampled.high) == pytest.approx((closed.low, closed.high), abs=0.015)
