"""The rewards that a run can name, a function of one completion each, and which answers they cannot read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lsr_scale.rewards.answers import find_answer


def exact_answer(completion: str, answer: str) -> float:
    """Return 1 where a completion has the answer of its row, 0 where it has another one or none.

    Args:
        completion: What the model said.
        answer: The row's; in both the answer is what `answers.find_answer` finds.
    """
    return float(find_answer(completion) == find_answer(answer))


def multiple_choice(completion: str, answer: str, choices: Sequence[str]) -> float:
    """Return 1 where the choice that a completion names first is the right one, 0 where it is another or none.

    A choice is named where its words stand there as whole words, in whatever case; a single letter in its own case. Of
    two that begin at one place the longer one is named.

    Args:
        completion: What the model said.
        answer: The right choice.
        choices: All of them.
    """
    named: list[tuple[int, int, str]] = []
    for choice in choices:
        text = choice.strip()
        flags = re.IGNORECASE if len(text) > 1 else re.NOFLAG
        if found := re.search(rf"(?<!\w){re.escape(text)}(?!\w)", completion, flags):
            named.append((found.start(), -len(text), text))
    return float(bool(named) and min(named)[2] == answer.strip())


def regex(completion: str, pattern: str) -> float:
    """Return 1 where a regular expression is found in a completion, whose lines `.` may span, else 0."""
    return float(re.search(pattern, completion, re.DOTALL) is not None)


def length(num_tokens: int, tokens: int, most: int) -> float:
    """Return 0 up to a number of tokens, then linearly less, -1 at the most: DAPO's (arXiv 2503.14476, eq. 13).

    Args:
        num_tokens: Of the completion, its end token included.
        tokens: Up to which nothing is taken off.
        most: Tokens of the longest completion, `max_completion_length`.
    """
    return -min(1.0, max(0.0, (num_tokens - tokens) / max(1, most - tokens)))


def unreadable(name: str, record: Mapping[str, Any]) -> str | None:
    """Return why a shipped reward cannot judge completions of a row, or None.

    Args:
        name: The reward's.
        record: The row as it is trained on: its `answer` and `choices`, None where it has none.
    """
    answer, choices = record.get("answer"), record.get("choices")
    if name == "exact_answer":
        if answer is None:
            return "exact_answer compares with the row's answer, and it has none; add a column answer"
        if find_answer(answer) is None:
            return (
                f"exact_answer finds no answer in {answer[-60:]!r}: no number, nothing behind '####', no \\boxed{{}}; "
                "rewrite it, or take another reward"
            )
    if name == "multiple_choice" and (answer is None or not choices):
        return "multiple_choice needs a question with choices and an answer, and the row has none; add them"
    if name == "multiple_choice" and choices and sum(_as_named(one) == _as_named(str(answer)) for one in choices) > 1:
        return f"multiple_choice cannot tell {answer!r:.60} from another of the choices; remove or reword one"
    return None


def _as_named(choice: str) -> str:
    """Return a choice as `multiple_choice` looks for it."""
    text = choice.strip()
    return text.casefold() if len(text) > 1 else text
