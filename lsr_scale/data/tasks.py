"""Multiple-choice tasks in the prompt forms of lm-eval 0.4.13: a row of data -> the texts that are scored.

Training and scoring read this one table, so that what is learned is what is measured. A row comes either in the
column layout of its hub dataset or in the uniform layout `{"question", "choices", "answer"}`; both give the same
`Example`. Rows of a task that is not in `TASKS` take the generic form `"Question: ...\\nAnswer:"`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lsr_scale.data import prompt_forms as forms
from lsr_scale.data import task_layouts as layouts
from lsr_scale.data.prompt_forms import Parts
from lsr_scale.data.rows import Row, RowError, Rows
from lsr_scale.data.task_layouts import Item
from lsr_scale.errors import UserError, did_you_mean

GENERIC = "multiple_choice"


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
    form: Callable[[Item], Parts] = forms.form_question
    read_uniform: Callable[[Row], Item] = layouts.read_uniform


_LETTERED = ("question", "choices", "answerKey")
_ARC = (_LETTERED, layouts.read_lettered)
_CHOICES_STEM = ("question_stem", "choices", "answerKey")
_SOCIAL = ("context", "question", "answerA", "answerB", "answerC")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings")
_BLANK = ("sentence", "option1", "option2")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("piqa", "baber/piqa", None, "validation", ("goal", "sol1", "sol2"), layouts.read_piqa),
        Task(
            "hellaswag",
            "Rowan/hellaswag",
            None,
            "validation",
            _HELLASWAG,
            layouts.read_hellaswag,
            forms.form_hellaswag,
            layouts.read_hellaswag_uniform,
        ),
        Task(
            "winogrande",
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            _BLANK,
            layouts.read_winogrande,
            forms.form_partial,
        ),
        Task("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", *_ARC),
        Task("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", *_ARC),
        Task(
            "openbookqa", "allenai/openbookqa", "main", "test", _CHOICES_STEM, layouts.read_openbookqa, forms.form_stem
        ),
        Task(
            "boolq",
            "aps/super_glue",
            "boolq",
            "validation",
            ("passage", "question"),
            layouts.read_boolq,
            forms.form_boolq,
            layouts.read_boolq_uniform,
        ),
        Task(
            "social_iqa", "lighteval/siqa", None, "validation", _SOCIAL, layouts.read_social_iqa, forms.form_social_iqa
        ),
        Task(
            "commonsense_qa",
            "tau/commonsense_qa",
            None,
            "validation",
            (*_LETTERED, "question_concept"),
            layouts.read_lettered,
            forms.form_lettered,
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
    item, known = _read(row, task)
    contexts, continuations, normalizers = (known.form if known else forms.form_question)(item)
    # A choice may be nothing but markup that a form removes; its length is a divisor all the same.
    lengths = tuple(max(1, length) for length in normalizers)
    name = next((row[key] for key in ("id", "idx", "ind") if row.get(key) not in (None, "")), default_id)
    return Example(str(name), tuple(contexts), tuple(continuations), item.answer, lengths)


def item_of(row: Row, task: str | None = None) -> Item:
    """Return the question of a row, without a prompt form; for the arguments and errors see `to_example`."""
    return _read(row, task)[0]


def _read(row: Row, task: str | None) -> tuple[Item, Task | None]:
    known = TASKS.get(task or "")
    if is_uniform(row):
        item = known.read_uniform(row) if known else layouts.read_uniform(row)
    else:
        known = known or TASKS.get(detect_task(row) or "")
        if known is None or not set(known.hub_keys) <= row.keys():
            hub_columns = f" or {', '.join(known.hub_keys)} (hub)" if known else ""
            columns = ", ".join(row)[:200] or "none"
            raise RowError(f"expected the columns question, choices, answer{hub_columns}, got {columns}")
        item = known.read(row)
    _check_distinct(item, published=known is not None)
    return item, known


def examples(rows: Rows, task: str | None = None) -> list[Example]:
    """Turn loaded rows into examples; `task` overrides the one that loading detected.

    Raises:
        UserError: A row does not fit (file and line named).
    """
    converted = []
    for index, row in enumerate(rows.rows):
        try:
            converted.append(to_example(row, task or rows.task, default_id=str(index)))
        except RowError as error:
            raise UserError(f"{rows.where(index)}: {error}") from None
    return converted


def check_task(name: str, where: str) -> None:
    """Raise a UserError with the nearest names unless `name` is a known task or the generic one."""
    options = [*TASKS, GENERIC]
    if name not in options:
        raise UserError(f"{where}: expected the name of a known task, got {name!r}; {did_you_mean(name, options)}")
