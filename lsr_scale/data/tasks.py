"""Multiple-choice tasks in the prompt forms of lm-eval 0.4.13: a row of data -> the texts that are scored.

Training and scoring read this one table, so that what is learned is what is measured. A row comes either in the
column layout of its hub dataset or in the uniform layout `{"question", "choices", "answer"}`; both give the same
`Example`. Rows of a task that is not in `TASKS` take the generic form `"Question: ...\\nAnswer:"`.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lsr_scale.data.rows import Rows
from lsr_scale.errors import UserError, did_you_mean

Row = Mapping[str, Any]
Parts = tuple[list[str], list[str], list[int]]  # contexts, continuations, normalizers
GENERIC = "multiple_choice"


class RowError(ValueError):
    """What is wrong with one row, without saying where it stands; the caller knows the file and the line."""


@dataclass(frozen=True)
class Example:
    """One question as it is scored: the log-likelihood of `continuations[i]` after `contexts[i]`, for each choice.

    Attributes:
        id: Name of the row, from the data where it has one.
        contexts: One text a choice; all equal, except in partial evaluation (WinoGrande).
        continuations: One text a choice, with its leading space; all equal in partial evaluation.
        answer: 0-based index of the right choice.
        normalizers: Characters by which each log-likelihood is divided for the length-normalized accuracy: those of
            the bare choice, as lm-eval counts them for acc_norm. All equal in partial evaluation.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int
    normalizers: tuple[int, ...]

    def sha256(self) -> str:
        """Return a hash of all that a score depends on."""
        content = (self.contexts, self.continuations, self.answer, self.normalizers)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Item:
    """A question before it has a prompt form: what both row layouts are read into."""

    question: str
    choices: tuple[str, ...]
    answer: int
    passage: str = ""


def scored_pair(context: str, continuation: str) -> tuple[str, str]:
    """Move white space at the end of `context` to the front of `continuation`, as lm-eval does before encoding.

    A tokenizer joins a space to the word behind it, so a context that ends with one would not be a token prefix.
    """
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


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


def _check_distinct(item: Item, published: bool) -> None:
    """Raise for choices that no score can tell apart.

    Published sets hold a few rows with two wrong choices alike (OpenBookQA's train part), which harm nobody.
    """
    texts = [choice.strip() for choice in item.choices]
    twice = [text for text in texts if texts.count(text) > 1]
    if texts[item.answer] in twice:
        raise RowError(
            f"the right choice {texts[item.answer]!r:.60} is there more than once; remove or reword the other"
        )
    if twice and not published:
        raise RowError(f"the choice {twice[0]!r:.60} is there more than once; remove or reword one")


def _read_uniform(row: Row) -> Item:
    choices = _texts(row.get("choices"), "choices")
    answer = row.get("answer")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
        raise RowError(f"expected the 0-based index of the right choice under 'answer', got {answer!r:.60}")
    # A text beside the question is never dropped in silence.
    passage = next((_text(row, key) for key in ("passage", "context") if row.get(key) is not None), "")
    return Item(_text(row, "question"), choices, _index(answer, "answer", len(choices)), passage)


def _read_piqa(row: Row) -> Item:
    choices = _texts([row.get("sol1"), row.get("sol2")], "[sol1, sol2]")
    return Item(_text(row, "goal"), choices, _index(row.get("label"), "label", 2))


def _read_hellaswag(row: Row) -> Item:
    context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    choices = _texts(row.get("endings"), "endings")
    return Item(f"{_text(row, 'activity_label')}: {context}", choices, _index(row.get("label"), "label", len(choices)))


def _read_winogrande(row: Row) -> Item:
    choices = _texts([row.get("option1"), row.get("option2")], "[option1, option2]")
    return Item(_text(row, "sentence"), choices, _index(row.get("answer"), "answer", 2, first=1))


def _read_lettered(row: Row, question_key: str = "question") -> Item:
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


def _read_openbookqa(row: Row) -> Item:
    return _read_lettered(row, "question_stem")


def _read_boolq(row: Row) -> Item:
    key = "label" if "label" in row else "answer"  # super_glue's column, google/boolq's column
    return Item(_text(row, "question"), ("no", "yes"), _index(row.get(key), key, 2), _text(row, "passage"))


def _read_boolq_uniform(row: Row) -> Item:
    item = _read_uniform(row)
    if tuple(choice.strip().lower() for choice in item.choices) not in {("false", "true"), ("no", "yes")}:
        raise RowError(f"expected the choices ['false', 'true'] or ['no', 'yes'], got {list(item.choices)}")
    return Item(item.question, ("no", "yes"), item.answer, item.passage)


def _read_social_iqa(row: Row) -> Item:
    choices = _texts([row.get(f"answer{letter}") for letter in "ABC"], "[answerA, answerB, answerC]")
    return Item(_text(row, "question"), choices, _index(row.get("label"), "label", 3, first=1), _text(row, "context"))


# HellaSwag's ActivityNet rows end in the first words of the next sentence, all in lower case, which lm-eval
# capitalizes from the column ctx_b; in the uniform layout that column is the tail of the question.
_LAST_FRAGMENT = re.compile(r"(?<=[.?!\")] )[a-z][^.?!]*$")


def _read_hellaswag_uniform(row: Row) -> Item:
    item = _read_uniform(row)
    question = _LAST_FRAGMENT.sub(lambda match: match.group().capitalize(), item.question.strip())
    return Item(question, item.choices, item.answer)


def _hellaswag_text(text: str) -> str:
    """Remove WikiHow's markup, as lm-eval's `hellaswag/utils.py` does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _answers(context: str, choices: Iterable[str]) -> Parts:
    """One context, one continuation a choice."""
    listed = list(choices)
    return [context] * len(listed), [f" {choice}" for choice in listed], [len(choice) for choice in listed]


def _form_question(item: Item) -> Parts:
    passage = f"{item.passage}\n" if item.passage else ""
    return _answers(f"{passage}Question: {item.question}\nAnswer:", item.choices)


def _form_boolq(item: Item) -> Parts:
    passage = f"{item.passage}\n" if item.passage else ""
    return _answers(f"{passage}Question: {item.question.rstrip('?')}?\nAnswer:", item.choices)


def _form_stem(item: Item) -> Parts:
    return _answers(item.question, item.choices)


def _form_hellaswag(item: Item) -> Parts:
    return _answers(_hellaswag_text(item.question), [_hellaswag_text(choice) for choice in item.choices])


def _form_social_iqa(item: Item) -> Parts:
    passage = f"{item.passage} " if item.passage else ""
    return _answers(f"Q: {passage}{item.question}\nA:", item.choices)


def _form_lettered(item: Item) -> Parts:
    if len(item.choices) > len(string.ascii_uppercase):
        raise RowError(f"expected at most {len(string.ascii_uppercase)} choices, one a letter, got {len(item.choices)}")
    letters = string.ascii_uppercase[: len(item.choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, item.choices, strict=True))
    return _answers(f"Question: {item.question.strip()}\n{listed}Answer:", letters)


def _form_partial(item: Item) -> Parts:
    """Partial evaluation (Trinh and Le, 2018): each option completes the context, the same rest is scored."""
    before, blank, rest = item.question.partition("_")
    if not blank or not rest.strip():
        raise RowError(f"expected a sentence with a blank '_' and words behind it, got {item.question!r:.80}")
    rest, num_choices = rest.strip(), len(item.choices)
    return [before + choice for choice in item.choices], [f" {rest}"] * num_choices, [len(rest)] * num_choices


@dataclass(frozen=True)
class Task:
    """A known task: where its data lives on the hub, which labelled split is scored, how rows become prompts.

    Attributes:
        name: lm-eval's name of the task.
        hub: Hub dataset.
        subset: Configuration of the hub dataset, or None.
        eval_split: The split that lm-eval scores (test where its labels are public, else validation).
        hub_keys: Columns by which the hub layout is recognized.
        read: Hub row -> Item.
        form: Item -> (contexts, continuations, normalizers).
        read_uniform: Uniform row -> Item.
    """

    name: str
    hub: str
    subset: str | None
    eval_split: str
    hub_keys: tuple[str, ...]
    read: Callable[[Row], Item]
    form: Callable[[Item], Parts] = _form_question
    read_uniform: Callable[[Row], Item] = _read_uniform


_LETTERED = ("question", "choices", "answerKey")
_ARC = (_LETTERED, _read_lettered)
_CHOICES_STEM = ("question_stem", "choices", "answerKey")
_SOCIAL = ("context", "question", "answerA", "answerB", "answerC")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings")
_BLANK = ("sentence", "option1", "option2")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("piqa", "baber/piqa", None, "validation", ("goal", "sol1", "sol2"), _read_piqa),
        Task(
            "hellaswag",
            "Rowan/hellaswag",
            None,
            "validation",
            _HELLASWAG,
            _read_hellaswag,
            _form_hellaswag,
            _read_hellaswag_uniform,
        ),
        Task(
            "winogrande", "allenai/winogrande", "winogrande_xl", "validation", _BLANK, _read_winogrande, _form_partial
        ),
        Task("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", *_ARC),
        Task("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", *_ARC),
        Task("openbookqa", "allenai/openbookqa", "main", "test", _CHOICES_STEM, _read_openbookqa, _form_stem),
        Task(
            "boolq",
            "aps/super_glue",
            "boolq",
            "validation",
            ("passage", "question"),
            _read_boolq,
            _form_boolq,
            _read_boolq_uniform,
        ),
        Task("social_iqa", "lighteval/siqa", None, "validation", _SOCIAL, _read_social_iqa, _form_social_iqa),
        Task(
            "commonsense_qa",
            "tau/commonsense_qa",
            None,
            "validation",
            (*_LETTERED, "question_concept"),
            _read_lettered,
            _form_lettered,
        ),
    )
}


def is_uniform(row: Row) -> bool:
    """Whether `row` has the uniform multiple-choice layout `{"question", "choices": [...], "answer"}`."""
    return {"question", "choices", "answer"} <= row.keys() and not isinstance(row["choices"], Mapping)


def detect_task(row: Row) -> str | None:
    """Return the task whose hub columns `row` has (the most specific one), or None.

    ARC-Easy and ARC-Challenge share columns and prompt form; either comes out as `arc_easy`.
    """
    fitting = [task for task in TASKS.values() if set(task.hub_keys) <= row.keys()]
    return max(fitting, key=lambda task: len(task.hub_keys)).name if fitting else None


def to_example(row: Row, task: str | None = None, default_id: str = "") -> Example:
    """Turn one row into the texts that are scored.

    Args:
        row: A row in the hub layout of `task` or in the uniform layout.
        task: A name in `TASKS`; any other name, or None, means the generic form (uniform rows) or the task that the
            columns show (hub rows).
        default_id: The id of a row that has none.

    Raises:
        RowError: The row does not fit; the message does not say where it stands.
    """
    known = TASKS.get(task or "")
    if is_uniform(row):
        item = known.read_uniform(row) if known else _read_uniform(row)
    else:
        known = known or TASKS.get(detect_task(row) or "")
        if known is None or not set(known.hub_keys) <= row.keys():
            layouts = f" or {', '.join(known.hub_keys)} (hub)" if known else ""
            columns = ", ".join(row)[:200] or "none"
            raise RowError(f"expected the columns question, choices, answer{layouts}, got {columns}")
        item = known.read(row)
    _check_distinct(item, published=known is not None)
    contexts, continuations, normalizers = (known.form if known else _form_question)(item)
    # A choice may be nothing but markup that a form removes; its length is a divisor all the same.
    lengths = tuple(max(1, length) for length in normalizers)
    name = next((row[key] for key in ("id", "idx", "ind") if row.get(key) not in (None, "")), default_id)
    return Example(str(name), tuple(contexts), tuple(continuations), item.answer, lengths)


def examples(rows: Rows, task: str | None = None) -> list[Example]:
    """Turn loaded rows into examples; `task` overrides the one that was found while loading.

    Raises:
        UserError: A row does not fit (file and line named).
    """
    found = []
    for index, row in enumerate(rows.rows):
        try:
            found.append(to_example(row, task or rows.task, default_id=str(index)))
        except RowError as error:
            raise UserError(f"{rows.where(index)}: {error}") from None
    return found


def check_task(name: str, where: str) -> None:
    """Raise a UserError with the nearest names unless `name` is a known task or the generic one."""
    options = [*TASKS, GENERIC]
    if name not in options:
        raise UserError(f"{where}: expected the name of a known task, got {name!r}; {did_you_mean(name, options)}")
