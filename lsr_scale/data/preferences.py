"""Rows that say which completion is preferred, for DPO, ORPO and KTO.

    {"prompt", "chosen", "rejected"}     preference: two completions of one prompt
    {"prompt", "completion", "label"}    unpaired: one completion, true where it is desirable

All are texts, or all lists of messages, which may call the row's `tools`. Where `chosen` and `rejected` are whole
conversations, the prompt is what they begin with alike. As other programs have them, beside a conversation (`messages`,
or ShareGPT's `conversations`):

    {"conversations", "chosen": {...}, "rejected": {...}}    its next turn, two of them
    {"conversations", "kto_tag"}                             its last turn is desirable or not; also `label`

A multiple-choice question becomes either kind: its right choice is preferred to a wrong one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from lsr_scale.data.conversations import (
    check_no_place,
    checked_messages,
    has_no_weight,
    has_turns,
    is_empty,
    tools_of,
    turns_of,
    with_lists,
    with_system,
)
from lsr_scale.data.prompt_forms import scored_pair
from lsr_scale.data.rows import Row, RowError, filled_text_of
from lsr_scale.data.tasks import Example

Turns = list[dict[str, str]]
# kinds of rows, and the columns of each that hold completions
COMPLETIONS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "chat_preference": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "chat_unpaired": ("completion",),
}

_LABELS = {"true": True, "false": False}


def preference(row: Row) -> dict[str, Any]:
    """Return a row of a preferred completion and another one.

    Raises:
        RowError: for what is missing or empty, or where both are the same.
    """
    row = with_lists(row, "chosen", "rejected")
    answers = (row.get("chosen"), row.get("rejected"))
    if any(isinstance(one, list | Mapping) for one in answers) or (row.get("prompt") is None and has_turns(row)):
        return _chat_preference(row)
    check_no_place(row)
    record = {name: filled_text_of(row, name) for name in ("prompt", "chosen", "rejected")}
    _check_differ(record["chosen"], record["rejected"])
    return record


def _chat_preference(row: Row) -> dict[str, Any]:
    is_next = any(isinstance(row.get(name), Mapping) for name in ("chosen", "rejected"))
    chosen, rejected = (_answers(row, name) for name in ("chosen", "rejected"))
    row = with_lists(row, "prompt")
    prompt = checked_messages(row["prompt"], "prompt") if isinstance(row.get("prompt"), list) else []
    if not prompt and is_next:
        key, prompt = _conversation(row)
        if prompt[-1]["role"] == "assistant":
            raise RowError(f"expected messages that the assistant answers under {key!r}, got its own turn at the end")
        _check_repeated(row.get("prompt"), prompt)
    if not prompt:  # whole conversations; a prompt beside them as a text is their first turn
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        _check_differ(chosen[shared:], rejected[shared:])
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise RowError(
                "expected a list of messages under 'prompt', or 'chosen' and 'rejected' that begin with the same turns"
            )
        _check_repeated(row.get("prompt"), prompt)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(turns, name)
    _check_differ(chosen, rejected)
    return {"prompt": _prompt(row, prompt), "chosen": chosen, "rejected": rejected, **tools_of(row)}


def _answers(row: Row, name: str) -> Turns:
    """Return the messages of an answer, which may stand alone, without a list around it."""
    answer = row.get(name)
    return checked_messages([answer] if isinstance(answer, Mapping) else answer, name)


def _conversation(row: Row) -> tuple[str, Turns]:
    """Return the column that has a row's conversation, and its turns."""
    key, turns = turns_of(row)
    return key, checked_messages(turns, key)


def _prompt(row: Row, messages: Turns) -> Turns:
    """Return the messages before a completion; that one of them is not to be learned holds for all of them."""
    return with_system(row, [{name: turn[name] for name in turn if name != "weight"} for turn in messages])


def _check_repeated(text: Any, prompt: Turns) -> None:
    """Raise where a prompt that stands as a text beside whole conversations is none of their turns: which one holds?"""
    if not text or any(turn["content"].strip() == str(text).strip() for turn in prompt):
        return
    raise RowError(
        f"expected a turn of 'chosen' and 'rejected' under 'prompt', got {text!r:.60}; remove one of the two prompts"
    )


def unpaired(row: Row) -> dict[str, Any]:
    """Return a row of a completion that is desirable or not.

    Raises:
        RowError: for what is missing or empty, or a label that is neither true nor false.
    """
    label, row = _label(row), with_lists(row, "prompt", "completion")
    if row.get("completion") is None and has_turns(row):
        key, turns = _conversation(row)
        _check_answer(turns[-1:], key)
        if len(turns) < 2:
            raise RowError(f"expected turns before the assistant's answer under {key!r}, got that alone")
        return {"prompt": _prompt(row, turns[:-1]), "completion": turns[-1:], "label": label, **tools_of(row)}
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        turns = checked_messages(row.get("completion"), "completion")
        _check_answer(turns, "completion")
        prompt = _prompt(row, checked_messages(row.get("prompt"), "prompt"))
        return {"prompt": prompt, "completion": turns, "label": label, **tools_of(row)}
    check_no_place(row)
    return {**{name: filled_text_of(row, name) for name in ("prompt", "completion")}, "label": label}


def _label(row: Row) -> bool:
    """Return whether a row's completion is desirable."""
    given = {name: row[name] for name in ("label", "kto_tag") if row.get(name) is not None}
    for name, value in (given or {"kto_tag" if "kto_tag" in row else "label": None}).items():
        if str(value).lower() not in _LABELS:  # the cells of a CSV are texts
            found = "nothing" if value is None else repr(value)[:60]
            raise RowError(f"expected true (desirable) or false under {name!r}, got {found}")
    labels = {_LABELS[str(value).lower()] for value in given.values()}
    if len(labels) > 1:
        raise RowError("'label' and 'kto_tag' say different things; remove one of the two columns")
    return labels.pop()


def judgement_of(row: Row) -> str | None:
    """Return which kind of judgement a row has that says so by itself, "preference" or "unpaired", or None.

    A column `label` does not: it may mean anything.
    """
    if row.get("kto_tag") not in (None, ""):  # the latter is an empty cell of a CSV
        return "unpaired"
    is_pair = has_turns(row) and any(isinstance(row.get(name), Mapping) for name in ("chosen", "rejected"))
    return "preference" if is_pair else None


def is_unpaired(row: Row) -> bool:
    """Tell whether a row is one of a completion that is desirable or not."""
    try:
        unpaired(row)
    except RowError:
        return False
    return True


def preference_of_question(example: Example) -> dict[str, Any]:
    """Return a question's right choice as preferred to a wrong one, which the question's hash chooses."""
    right, wrong = (_whole(example, index) for index in (example.answer, _wrong_choice(example)))
    prompt, chosen = scored_pair(example.contexts[example.answer], example.continuations[example.answer])
    if example.contexts[_wrong_choice(example)] != example.contexts[example.answer]:
        # choices stand within the text: it is the prompt up to there
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(right, wrong, strict=False))
        prompt = "".join(one for one, _ in alike).rpartition(" ")[0]
        chosen = right[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": wrong[len(prompt) :]}


def unpaired_of_question(example: Example) -> dict[str, Any]:
    """Return a question with its right choice, desirable, or with a wrong one: the question's hash chooses."""
    pair, label = preference_of_question(example), _number(example) % 2 == 0
    return {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


OF_QUESTIONS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "preference": preference_of_question,
    "unpaired": unpaired_of_question,
}


def kind_of(record: Mapping[str, Any]) -> str | None:
    """Return the kind of a converted row, None where it is not of this module."""
    chat = "chat_" if isinstance(record.get("prompt"), list) else ""
    if "chosen" in record:
        return f"{chat}preference"
    return f"{chat}unpaired" if "completion" in record and "label" in record else None


def _wrong_choice(example: Example) -> int:
    wrong = [index for index in range(len(example.continuations)) if index != example.answer]
    return wrong[_number(example) // 2 % len(wrong)]


def _number(example: Example) -> int:
    return int(hashlib.sha256("\0".join((*example.contexts, *example.continuations)).encode()).hexdigest(), 16)


def _whole(example: Example, index: int) -> str:
    return example.contexts[index] + example.continuations[index]


def _check_answer(turns: Sequence[Mapping[str, str]], name: str) -> None:
    if not turns or turns[0]["role"] != "assistant":
        found = turns[0]["role"] if turns else "nothing"
        raise RowError(f"expected an assistant turn as the answer under {name!r}, got {found}")
    if all(is_empty(turn) for turn in turns):
        raise RowError(f"expected an answer under {name!r}, got an empty one")
    if any(map(has_no_weight, turns)):
        raise RowError(f"a turn under {name!r} is not to be learned, but answers are judged whole; remove its weight")


def _check_differ(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same: nothing is preferred; remove the row")
