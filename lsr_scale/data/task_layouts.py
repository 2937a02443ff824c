"""Multiple-choice rows in the column layouts of their hub datasets, or in the uniform one, read into an `Item`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lsr_scale.data.rows import Row, RowError


@dataclass(frozen=True)
class Item:
    """A question before it has a prompt form: what both row layouts are read into."""

    question: str
    choices: tuple[str, ...]
    answer: int
    passage: str = ""


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"expected a text under {key!r}, got {'nothing' if value is None else repr(value)[:60]}")
    return value


def _texts(values: object, key: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise RowError(f"expected a list of at least two texts under {key!r}, got {values!r:.60}")
    for index, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"expected a text that is not empty as {key}[{index}], got {value!r:.60}")
    return tuple(values)


_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
_TRUTH = {"false": 0, "true": 1}


def whole_number(value: object) -> int | None:
    """Return a whole number written as an integer, a boolean, a text or a float without a fraction; None for others."""
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else _TRUTH.get(text.lower())
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return None


def _index(value: object, key: str, num_choices: int, first: int = 0) -> int:
    """Read a label that counts from `first`; hub datasets write it as an int, a bool or a text."""
    if value in (None, "", -1, "-1"):
        raise RowError(f"no label under {key!r}: official test sets are often published without; use another split")
    number = whole_number(value)
    if number is None:
        raise RowError(f"expected a whole number under {key!r}, got {value!r:.60}")
    if not 0 <= number - first < num_choices:
        raise RowError(f"expected {key!r} between {first} and {first + num_choices - 1}, got {value!r:.60}")
    return number - first


def read_uniform(row: Row) -> Item:
    """Read `{"question", "choices", "answer"}`, with the passage where there is one."""
    choices = _texts(row.get("choices"), "choices")
    answer = row.get("answer")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
        raise RowError(f"expected the 0-based index of the right choice under 'answer', got {answer!r:.60}")
    # A text beside the question is never dropped in silence.
    passage = next((_text(row, key) for key in ("passage", "context") if row.get(key) is not None), "")
    return Item(_text(row, "question"), choices, _index(answer, "answer", len(choices)), passage)


def read_piqa(row: Row) -> Item:
    """Read a row of baber/piqa."""
    choices = _texts([row.get("sol1"), row.get("sol2")], "[sol1, sol2]")
    return Item(_text(row, "goal"), choices, _index(row.get("label"), "label", 2))


def read_hellaswag(row: Row) -> Item:
    """Read a row of Rowan/hellaswag."""
    context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    choices = _texts(row.get("endings"), "endings")
    return Item(f"{_text(row, 'activity_label')}: {context}", choices, _index(row.get("label"), "label", len(choices)))


def read_winogrande(row: Row) -> Item:
    """Read a row of allenai/winogrande."""
    choices = _texts([row.get("option1"), row.get("option2")], "[option1, option2]")
    return Item(_text(row, "sentence"), choices, _index(row.get("answer"), "answer", 2, first=1))


def read_lettered(row: Row, question_key: str = "question") -> Item:
    """Rows with `choices: {"text": [...], "label": [...]}` and an `answerKey` (ARC, OpenBookQA, CommonsenseQA)."""
    table = row.get("choices")
    if not isinstance(table, Mapping):
        raise RowError(f"expected {{'text': [...], 'label': [...]}} under 'choices', got {table!r:.60}")
    choices, labels = _texts(table.get("text"), "choices.text"), _texts(table.get("label"), "choices.label")
    if len(labels) != len(choices) or len(set(labels)) < len(labels):
        raise RowError(f"expected a label of its own for each of {len(choices)} choices, got {list(labels)!r:.60}")
    key = _text(row, "answerKey").strip()
    if not key:
        raise RowError("no label under 'answerKey': official test sets are often published without; use another split")
    if key not in labels:
        raise RowError(f"expected 'answerKey' to be one of {', '.join(labels)[:60]}, got {key!r:.60}")
    return Item(_text(row, question_key), choices, labels.index(key))


def read_openbookqa(row: Row) -> Item:
    """Read a row of allenai/openbookqa."""
    return read_lettered(row, "question_stem")


def read_boolq(row: Row) -> Item:
    """Read a row of super_glue or google/boolq."""
    key = "label" if "label" in row else "answer"  # super_glue's column, google/boolq's column
    return Item(_text(row, "question"), ("no", "yes"), _index(row.get(key), key, 2), _text(row, "passage"))


def read_boolq_uniform(row: Row) -> Item:
    """Read a uniform row of BoolQ, whose choices are false and true, or no and yes."""
    item = read_uniform(row)
    if tuple(choice.strip().lower() for choice in item.choices) not in {("false", "true"), ("no", "yes")}:
        raise RowError(f"expected the choices ['false', 'true'] or ['no', 'yes'], got {list(item.choices)}")
    return Item(item.question, ("no", "yes"), item.answer, item.passage)


def read_social_iqa(row: Row) -> Item:
    """Read a row of lighteval/siqa."""
    choices = _texts([row.get(f"answer{letter}") for letter in "ABC"], "[answerA, answerB, answerC]")
    return Item(_text(row, "question"), choices, _index(row.get("label"), "label", 3, first=1), _text(row, "context"))


# HellaSwag's ActivityNet rows end in the first words of the next sentence, all in lower case, which lm-eval
# capitalizes from the column ctx_b; in the uniform layout that column is the tail of the question.
_LAST_FRAGMENT = re.compile(r"(?<=[.?!\")] )[a-z][^.?!]*$")


def read_hellaswag_uniform(row: Row) -> Item:
    """Read a uniform row of HellaSwag."""
    item = read_uniform(row)
    question = _LAST_FRAGMENT.sub(lambda match: match.group().capitalize(), item.question.strip())
    return Item(question, item.choices, item.answer)
