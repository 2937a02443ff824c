"""What completions are worth, and that what is no reward ends the run with the row named."""

import math
import sys

import pytest
import torch

from lsr_scale.config.rewards import Reward
from lsr_scale.errors import UserError
from lsr_scale.rewards import shipped
from lsr_scale.rewards.checked import CheckedReward
from lsr_scale.rewards.user_file import load_function

BATCH = {
    "prompts": ["Two and two?", "Three and three?"],
    "completions": ["It is 4.", "It is 7."],
    "completion_ids": [[1, 2, 3], [1] * 10],
    "answer": ["#### 4", "6"],
    "choices": [["4", "5"], ["6", "7"]],
    "row": ["rows.jsonl, line 1", "rows.jsonl, line 2"],
}


def reward(name: str, most_tokens: int = 10, **options) -> CheckedReward:
    """Return a reward of a run."""
    return CheckedReward(Reward(name=name, **options), most_tokens)


def of_file(folder, code: str) -> CheckedReward:
    """Return the reward of a user's file with this body of its function."""
    file = folder / "mine.py"
    file.write_text(f"import math\ndef score(completions, **columns):\n    {code}\n")
    return reward(f"{file}:score")


def test_each_shipped_reward_judges_a_batch():
    assert reward("exact_answer")(**BATCH) == [1.0, 0.0]
    assert reward("regex", pattern=r"is \d")(**BATCH) == [1.0, 1.0]
    assert reward("regex", pattern="4")(**BATCH) == [1.0, 0.0]
    assert reward("length", tokens=5)(**BATCH) == [0.0, -1.0]
    assert reward("multiple_choice")(**{**BATCH, "answer": ["4", "6"]}) == [1.0, 0.0]


def test_conversations_are_judged_by_what_the_assistant_said():
    turns = [[{"role": "assistant", "content": text}] for text in BATCH["completions"]]
    assert reward("exact_answer")(**{**BATCH, "completions": turns}) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("Red.", True),
        ("It is red, not blue", True),
        ("blue or red", False),
        ("a hundred", False),  # no whole word
        ("dark red, I think", False),  # the longer of two that begin at one place
        ("nothing of it", False),
    ],
)
def test_the_choice_that_is_named_first_counts(completion, right):
    assert shipped.multiple_choice(completion, "red", ["red", "blue", "dark red"]) == right


def test_single_letters_are_read_in_their_own_case():
    assert shipped.multiple_choice("a bird: B", "B", ["A", "B"]) == 1


def test_length_is_trls_soft_punishment():
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    ids = [[0] * num for num in (1, 80, 81, 95, 100)]
    assert [shipped.length(len(one), 80, 100) for one in ids] == pytest.approx(theirs(ids))


@pytest.mark.parametrize(
    ("code", "found", "place"),
    [
        ("return [1.0, math.nan]", "returned nan", "line 2"),
        ("return [1.0, 'good']", "returned 'good'", "line 2"),
        ("return [math.inf, 1]", "returned inf", "line 1"),
        ("return [1.0, None]", "returned None", "line 2"),
        ("return [1.0]", "returned 1, where 2 rewards were expected", "line 1"),
        ("return 1.0", "returned 1.0, where 2 rewards", "line 1"),
        ("import torch; return torch.tensor(1.0)", "returned tensor(1.), where 2 rewards", "line 1"),
        ("return [{'It is 4.': 1}[c] for c in completions]", "line 3 raises KeyError: 'It is 7.'", "line 2"),
        ("return 1 / (2 - len(completions))", "the batch that begins with", "line 1"),
    ],
)
def test_what_is_no_reward_ends_the_run_with_its_row(tmp_path, code, found, place):
    score = of_file(tmp_path, code)
    with pytest.raises(UserError) as error:
        score(**BATCH)
    assert found in str(error.value)
    assert f"rows.jsonl, {place}" in str(error.value)


def test_a_users_function_sees_what_trls_would(tmp_path):
    score = of_file(tmp_path, "return [float(a in c) for a, c in zip(['4', '6'], completions)]")
    assert score(**BATCH) == [1.0, 0.0]
    assert score.__name__ == "score"
    tensors = of_file(tmp_path, "import torch; return torch.ones(len(completions)) * len(columns['row'][1]) / 18")
    assert tensors(**BATCH) == [1.0, 1.0]
    assert all(math.isfinite(value) for value in tensors(**BATCH))
    assert torch.tensor(tensors(**BATCH)).dtype == torch.float32


def test_a_users_file_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_the_reward.py").write_text("def right(text):\n    return float('4' in text)\n")
    (tmp_path / "beside_later.py").write_text("TIMES = 2\n")
    lines = ["from beside_the_reward import right", "def score(completions):", "    import beside_later"]
    lines.append("    return [beside_later.TIMES * right(one) for one in completions]")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    assert load_function(tmp_path / "mine.py", "score")(["4", "5"]) == [2.0, 0.0]
    assert sys.path[-1] == str(tmp_path), "it hides no library"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "score", "cannot be read"),
        ("x = 1 / 0", "score", "line 1 raises ZeroDivisionError"),
        ("def scores(): pass", "score", "did you mean 'scores'"),
        ("score = 3", "score", "is no function, but int"),
        ("import sys; sys.exit(0)", "score", "line 1 raises SystemExit: 0"),
        ("class score: pass", "score", "is a class; write a plain function"),
        ("async def score(completions): return []", "score", "is async; write a plain function"),
        ("def score(completions, /): return []", "score", "takes some by their place alone"),
    ],
)
def test_a_file_that_gives_no_function_is_refused(tmp_path, text, name, said):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"training\.reward: .*mine\.py") as error:
        reward(f"{file}:{name}")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "record", "why"),
    [
        ("exact_answer", {"answer": None}, "it has none"),
        ("exact_answer", {"answer": "none of it"}, "finds no answer"),
        ("multiple_choice", {"answer": "4"}, "needs a question with choices"),
        ("multiple_choice", {"answer": "Yes", "choices": ["Yes", "yes"]}, "cannot tell 'Yes'"),
        ("multiple_choice", {"answer": "a", "choices": ["a", "A"]}, None),
        ("exact_answer", {"answer": "#### 3"}, None),
        ("regex", {}, None),
    ],
)
def test_answers_that_a_reward_cannot_read_are_told(name, record, why):
    found = shipped.unreadable(name, record)
    assert (found is None) if why is None else (why in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "exact_anser"}, "did you mean 'exact_answer'"),
        ({"name": "regex"}, "needs a pattern"),
        ({"name": "regex", "pattern": "("}, "no regular expression"),
        ({"name": "regex", "pattern": "(a*)*b"}, "take for ever"),
        ({"name": "exact_answer", "tokens": 3}, "an option of length"),
        ({"name": "regex", "pattern": ""}, "at least 1 character"),
        ({"name": "mine.py:1"}, "behind the colon"),
        ({"name": "mine.py:score:x"}, "got 'score:x' behind the colon"),
        ({"name": "length", "weight": math.nan}, "finite"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ValueError, match="validation error") as error:
        Reward(**options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return [1e300] * len(completions)", "returned 1e+300"),
        ("return [10**400] * len(completions)", "returned a number of many digits"),
        ("raise SystemExit(0)", "line 3 raises SystemExit: 0 for rows.jsonl, line 1"),
        ("raise ValueError('two\\nlines')", "raises ValueError: two lines for"),
        ("raise KeyError", "raises KeyError for"),
        ("import torch; return torch.ones(2, 1)", "returned tensor([[1.], [1.]]), where 2 rewards"),
    ],
)
def test_what_is_no_reward_is_told_in_a_line(tmp_path, code, said):
    with pytest.raises(UserError) as error:
        of_file(tmp_path, code)(**BATCH)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_is_given_what_it_takes_and_lists_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def few(completions, answer):\n    return [float(len(one)) for one in answer]\n"
        "def spoils(completions, **columns):\n"
        "    torch.manual_seed(0)\n    completions.clear()\n    columns['row'].clear()\n    return [1, 2]\n"
        "def wants(completions, level, *, more=1):\n    return []\n"
    )
    assert reward(f"{tmp_path / 'mine.py'}:few")(**BATCH) == [6.0, 1.0]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert reward(f"{tmp_path / 'mine.py'}:spoils")(**BATCH) == [1.0, 2.0]
    assert torch.equal(torch.random.get_rng_state(), before), "or all completions would be drawn alike"
    assert BATCH["row"]
    wants = reward(f"{tmp_path / 'mine.py'}:wants")
    wants.check_columns(["prompt", "level"], "data.train")
    with pytest.raises(UserError, match=r"must be given level, which the rows of data\.validation do not have"):
        wants.check_columns(["prompt", "answer"], "data.validation")
