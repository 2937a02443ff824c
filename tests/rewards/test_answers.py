"""The answer in a text, on solutions of GSM8K and on what models write."""

from fractions import Fraction

import pytest

from lsr_scale.rewards.answers import find_answer

# solutions of GSM8K's training part, as published
GSM8K = [
    (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in "
        "April and May.\n#### 72",
        72,
    ),
    (
        "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = "
        "$<<0.2*50=10>>10.\n#### 10",
        10,
    ),
    (
        "In the beginning, Betty has only 100 / 2 = $<<100/2=50>>50.\nBetty's grandparents gave her 15 * 2 = "
        "$<<15*2=30>>30.\nThis means, Betty needs 100 - 50 - 30 - 15 = $<<100-50-30-15=5>>5 more.\n#### 5",
        5,
    ),
    ("#### 2,125", 2125),  # the forms that answers of its test part have
    ("#### -10", -10),
    ("#### 1,450,000", 1450000),
]


@pytest.mark.parametrize(("text", "answer"), GSM8K)
def test_the_published_answers_are_read(text, answer):
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 42.", 42),
        ("It costs $1,234.50 in all.", Fraction("1234.5")),
        ("24-12 is 12, and 12-24 is -12", -12),
        ("(-3)", -3),
        ("half of it is 1/2", Fraction(1, 2)),
        ("a tenth: .1", Fraction(1, 10)),
        ("as floats are written: 1e5.", 100000),
        ("#### 2.5e-07", Fraction(25, 10**8)),
        ("3e4x is none", 4),
        ("first 1,2,3 then", 3),
        ("dividing by nothing, 7/0, is 5", 5),
        (r"so \boxed{\frac{1}{2}} and 3 more", Fraction(1, 2)),
        (r"\boxed{7} no, \boxed{{8}}", 8),
        (r"\boxed{x+1}", "x+1"),
        (r"\boxed{\text{Paris}}.", "paris"),
        ("#### $42.00 dollars\nor 43", 42),
        ("#### Paris", "paris"),
        ("#### 5 \\boxed{6}", 5),
        ("an open \\boxed{9", 9),
        ("", None),
        ("no number", None),
        ("####", None),
    ],
)
def test_marks_then_boxes_then_the_last_number(text, answer):
    assert find_answer(text) == answer


def test_long_digits_cost_nothing():
    assert find_answer("9" * 100_000) is None
    assert find_answer("\\boxed{" * 2_000 + "1" + "}" * 2_000) is not None
