"""Rows of any usual shape -> the dataset that the trainer takes.

Multiple choice, Alpaca and prompt/completion rows all become `{"prompt", "completion"}`; ShareGPT, messages and Alpaca
with a history become `{"messages"}`; plain text and classification rows stay what they are. The completion of a
multiple-choice row is exactly the scored text of its right choice: TRL appends the end-of-sequence token behind it, so
training has one more supervised token (the model learns to stop after the answer) that no score ever looks at. What
says which completion is preferred is `preferences`'.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lsr_scale.config.methods import METHODS
from lsr_scale.data import alpaca, answered_prompts, conversations, preferences
from lsr_scale.data.answered_prompts import PromptForm
from lsr_scale.data.conversations import (
    check_learnable,
    check_no_place,
    check_texts_alone,
    checked_messages,
    conversation,
    tools_of,
    turns_of,
    with_lists,
    with_system,
)
from lsr_scale.data.labels import Labels, number_of
from lsr_scale.data.prompt_forms import scored_pair
from lsr_scale.data.rows import Row, RowError, Rows, text_of
from lsr_scale.data.sources import load_rows
from lsr_scale.data.tasks import Example, detect_task, is_uniform, to_example
from lsr_scale.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_Plain = Literal["prompt_completion", "chat_prompt_completion", "messages", "text", "classification"]
Kind = (
    _Plain | Literal["preference", "chat_preference", "unpaired", "chat_unpaired"] | Literal["prompts", "chat_prompts"]
)
KIND_MEANING: dict[str, str] = {
    "prompt_completion": "raw text, loss on the completion",
    "chat_prompt_completion": "chat template, loss on the assistant's turns in the completion",
    "messages": "chat template, loss on the assistant's turns",
    "text": "raw text, loss on every token",
    "classification": "two sentences and a label, for task: seq_cls",
    "preference": "raw text, a chosen completion and a rejected one",
    "chat_preference": "chat template, a chosen answer and a rejected one",
    "unpaired": "raw text, a completion that is desirable or not",
    "chat_unpaired": "chat template, an answer that is desirable or not",
    **answered_prompts.KINDS,
}

# Column pairs by which GLUE and its relatives name two sentences.
SENTENCE_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence1", None),
    ("sentence", None),
    ("text", None),
)


def _filled(text: str, key: str) -> str:
    if not text.strip():
        raise RowError(f"expected something to learn under {key!r}, got an empty text")
    return text


def _prompt_completion(row: Row) -> dict[str, Any]:
    """The texts exactly as they are written; question/answer rows take the form of multiple-choice questions."""
    if _is_question_answer(row):
        return {"prompt": f"Question: {text_of(row, 'question')}\nAnswer:", "completion": f" {text_of(row, 'answer')}"}
    row = with_lists(row, "prompt", "completion")
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = checked_messages(completion, "completion")
        check_learnable(turns, "completion")
        messages = with_system(row, checked_messages(prompt, "prompt"))
        return {"prompt": messages, "completion": turns, **tools_of(row)}
    check_no_place(row)
    return {"prompt": text_of(row, "prompt"), "completion": _filled(text_of(row, "completion"), "completion")}


def _classification(row: Row) -> dict[str, Any]:
    """The sentences, and the label if it is a number; `build_dataset` knows the classes of a run."""
    return {**sentences(row), "label": number_of(row)}


def sentences(row: Row) -> dict[str, str]:
    """Return a row's one or two sentences, under whatever names; the second is "" where there is none.

    Raises:
        RowError: if there is no text.
    """
    first, second = next(
        (pair for pair in SENTENCE_PAIRS if pair[0] in row and (pair[1] is None or row.get(pair[1]) is not None)),
        SENTENCE_PAIRS[0],
    )
    text = text_of(row, first)
    if not text.strip():
        raise RowError(f"expected a text to classify under {first!r}, got an empty one")
    return {"sentence1": text, "sentence2": text_of(row, second) if second else ""}


def _plain_text(row: Row) -> dict[str, Any]:
    return {"text": _filled(text_of(row, "text"), "text")}


CONVERTERS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "prompt_completion": _prompt_completion,
    "messages": conversation,
    "sharegpt": conversation,
    "text": _plain_text,
    "classification": _classification,
    "preference": preferences.preference,
    "unpaired": preferences.unpaired,
}
COLUMNS = (
    "prompt and completion; messages; instruction and output; text; question, choices and answer; text and label; "
    "prompt, chosen and rejected"
)
FORMATS = ("auto", "multiple_choice", "prompts", "alpaca", "alpaca_chat", *CONVERTERS)


def multiple_choice_record(row: Row, task: str | None = None) -> dict[str, str]:
    """Turn a multiple-choice row into prompt and completion: the scored texts of its right choice.

    Raises:
        RowError: The row does not fit; the message does not say where it stands.
    """
    return _of_question(to_example(row, task))


def _of_question(example: Example) -> dict[str, str]:
    prompt, completion = scored_pair(example.contexts[example.answer], example.continuations[example.answer])
    return {"prompt": prompt, "completion": completion}


def question_records(examples: Iterable[Example], kind: Kind) -> list[dict[str, Any]]:
    """Return questions as rows of a kind would have them; none of a kind that is not made of scored texts."""
    convert = {"prompt_completion": _of_question, **preferences.OF_QUESTIONS}.get(kind)
    return [] if convert is None else [convert(example) for example in examples]


def fitting_formats(row: Row, method: str | None = None) -> list[str]:
    """Return every format whose columns `row` has; plain text counts only where no richer reading is there.

    Args:
        row: A row.
        method: The training method, which decides where rows may be read as what it takes: a part of their columns is
            enough then, so that what is missing is told.
    """
    keys = row.keys()
    taken = METHODS[method].rows if method else ()
    of_alpaca = alpaca.has_preference(row)
    if "preference" in taken and keys & {"chosen", "rejected"}:
        return ["alpaca" if of_alpaca else "preference"]
    if "unpaired" in taken and {"prompt", "completion"} <= keys:
        return ["unpaired"]
    try:
        _, turns = turns_of(row)
    except RowError:
        turns = None
    is_conversation = isinstance(turns, list)
    from_value = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
    labelled_text = "label" in keys and "text" in keys
    if "unpaired" in taken and is_conversation and keys & {"label", "kto_tag"}:
        return ["unpaired"]
    fits = {
        "multiple_choice": is_uniform(row) or detect_task(row) is not None,
        "messages": is_conversation and not from_value,
        "sharegpt": from_value,
        "prompt_completion": {"prompt", "completion"} <= keys or _is_question_answer(row),
        "alpaca": bool(keys & set(alpaca.INSTRUCTIONS)) and bool(keys & set(alpaca.OUTPUTS)),
        "classification": "label" in keys
        and any(first in keys and (second is None or second in keys) for first, second in SENTENCE_PAIRS),
    }
    fitting = [name for name, fit in fits.items() if fit]
    if not fitting and {"chosen", "rejected"} <= keys:
        return ["alpaca" if of_alpaca else "preference"]
    return [*fitting, "text"] if "text" in keys and (not fitting or labelled_text) else fitting


def _check_unjudged(rows: Rows, data_format: str, method: str | None) -> None:
    """Raise for a row whose answers are judged, where what is trained would take no notice of that."""
    taken = METHODS[method or "sft"].rows
    if data_format not in ("messages", "sharegpt", "prompt_completion", "alpaca"):
        return
    for index, row in enumerate(rows.rows):
        judged = preferences.judgement_of(row)
        if judged is None or judged in taken:
            continue
        names = "'kto_tag'" if judged == "unpaired" else "'chosen' and 'rejected'"
        methods = " or ".join(name for name, one in METHODS.items() if judged in one.rows)
        learned = f", or format: {data_format} to learn every answer as if these were not there"
        raise UserError(
            f"{rows.where(index)}: rows with {names} are for training.method: {methods}; set that"
            f"{learned if 'messages' in taken else ''}"
        )


def _is_question_answer(row: Row) -> bool:
    return "choices" not in row and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)


def _convert(
    rows: Rows,
    data_format: str,
    where: str,
    check: Callable[[dict[str, Any]], None] | None,
    labels: Labels | None,
    model_task: str | None,
    method: str | None,
) -> tuple[list[dict[str, Any]], Kind]:
    """Convert the rows of one source; the format is detected on its first row and holds for all."""
    if data_format == "prompts":
        raise UserError(f"{where}: format prompts is for training.method: grpo; set that, or another format")
    if data_format not in FORMATS:
        raise UserError(f"{where}: unknown format {data_format!r}; {did_you_mean(data_format, FORMATS)}")
    if data_format == "auto":
        fits = fitting_formats(rows.rows[0], method)
        if model_task == "seq_cls" and "classification" in fits:
            fits = ["classification"]
        if not fits and model_task != "seq_cls" and rows.rows[0].keys() & set(conversations.COLUMNS):
            fits = ["messages"]  # which says what is wrong with the first one
        if len(fits) != 1 or (model_task == "seq_cls" and fits == ["text"]):
            columns = ", ".join(rows.rows[0])[:200]
            if model_task == "seq_cls" and fits in ([], ["text"]):
                raise UserError(
                    f"{where}: rows with the columns {columns} are not classification rows, which have a column label "
                    "and a text (text, sentence, or the pair sentence1 and sentence2); rename the columns"
                )
            what = (
                f"fit more than one format; set format to one of: {', '.join(fits)}"
                if fits
                else f"fit no format that is known; rename them: {COLUMNS}"
            )
            raise UserError(f"{where}: rows with the columns {columns} {what}")
        data_format = fits[0]
        _check_unjudged(rows, data_format, method)
        if data_format == "alpaca" and any(map(alpaca.is_conversation, rows.rows)):
            data_format = "alpaca_chat"
    records, kinds = [], []
    convert = _converter(data_format, rows, labels, METHODS[method].rows if method else ())
    for index, row in enumerate(rows.rows):
        try:
            check_texts_alone(row)
            records.append(convert(row))
            if check is not None:
                check(records[-1])
        except RowError as error:
            raise UserError(f"{rows.where(index)}: {error} (read as {data_format})") from None
        kinds.append(_kind(records[-1]))
        if kinds[-1] != kinds[0]:
            raise UserError(f"{rows.where(index)}: {kinds[-1]} among rows of kind {kinds[0]}; keep one kind a source")
    return records, kinds[0]


def _converter(
    data_format: str, rows: Rows, labels: Labels | None, taken: tuple[str, ...]
) -> Callable[[Row], dict[str, Any]]:
    """Return what converts the rows of one source.

    Args:
        data_format: Their format.
        rows: The rows.
        labels: A classifier's.
        taken: The kinds of rows that the training method takes.
    """
    if data_format == "multiple_choice":
        of_question = next((read for kind, read in preferences.OF_QUESTIONS.items() if kind in taken), None)
        if of_question is not None:
            return lambda row: of_question(to_example(row, rows.task))
        return lambda row: multiple_choice_record(row, rows.task)
    if data_format == "classification" and labels is not None:
        return lambda row: {**sentences(row), "label": labels.encode(row, rows.label_names)}
    if data_format in ("alpaca", "alpaca_chat"):
        chat, target = data_format == "alpaca_chat", alpaca.target_of(rows.rows[0], taken)
        convert = CONVERTERS[("messages" if chat else "prompt_completion") if target == "completion" else target]
        return lambda row: convert(alpaca.own_row(row, target, chat))
    return CONVERTERS[data_format]


def _kind(record: Mapping[str, Any]) -> Kind:
    if of_preferences := preferences.kind_of(record):
        return of_preferences  # pyright: ignore[reportReturnType]
    if "prompt" in record:
        return "prompt_completion" if isinstance(record["prompt"], str) else "chat_prompt_completion"
    return "messages" if "messages" in record else "text" if "text" in record else "classification"


def source_fields(source: "str | Mapping[str, Any] | Any") -> dict[str, Any]:
    """Return path, name, revision, split, task, format, limit of a source given as a path, a mapping or an object."""
    names = ("path", "name", "revision", "split", "task", "format", "limit")
    if isinstance(source, str):
        return {"path": source}
    get = source.get if isinstance(source, Mapping) else lambda name: getattr(source, name, None)
    return {name: value for name in names if (value := get(name)) is not None}


def load_source(source: "str | Mapping[str, Any] | Any", default_split: str | None = "train") -> Rows:
    """Read one source (see `load_rows`), whatever its format."""
    fields = source_fields(source)
    fields.pop("format", None)
    return load_rows(**fields, default_split=default_split)


def build_dataset(
    sources: Sequence["str | Mapping[str, Any] | Any"],
    default_split: str | None = "train",
    *,
    model_task: str | None = None,
    loaded: Sequence[Rows] | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    labels: Labels | None = None,
    method: str | None = None,
    form: PromptForm | None = None,
) -> tuple["Dataset", Kind]:
    """Read the sources, convert their rows and put them one after the other, in the order given.

    Args:
        sources: Paths, mappings or objects with the fields path, name, split, task, format, limit.
        default_split: The split of a source that names none.
        model_task: `causal_lm` or `seq_cls`: data of the wrong sort for it is refused. None takes any.
        loaded: The rows of the sources, where they were read already (`load_source`).
        check: Called with every converted row; a RowError that it raises is told with the row's place.
        labels: A classifier's, by which rows get the numbers of their classes; None leaves numbers as they stand.
        method: `training.method`, of a language model: rows of the wrong kind for it are refused, and multiple-choice
            questions become what it takes. None takes any, and questions become prompt and completion.
        form: Rows are read as prompts that the model completes by itself, as it says.

    Returns:
        The dataset and its kind, a key of `KIND_MEANING`.

    Raises:
        UserError: A source cannot be read, a row does not fit (file and line named), or the kinds do not go together.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not sources:
        raise UserError("data: expected at least one source, got an empty list")
    records: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    loaded = loaded or [load_source(source, default_split) for source in sources]
    for source, rows in zip(sources, loaded, strict=True):
        fields = source_fields(source)
        where = f"data source {fields['path']!r}"
        if form is not None:
            _check_prompts(fields.get("format", "auto"), where)
            converted, kind = answered_prompts.prompt_records(rows, form, check)
        else:
            converted, kind = _convert(rows, fields.get("format", "auto"), where, check, labels, model_task, method)
        records += converted
        kinds.setdefault(kind, where)
    if len(kinds) > 1:
        listed = "; ".join(f"{where} is {kind} ({KIND_MEANING[kind]})" for kind, where in kinds.items())
        firsts = [fitting_formats(rows.rows[0], method) for rows in loaded]
        advice = "Rewrite one"
        if ["alpaca"] in firsts:
            advice = "Rewrite one, or set format: alpaca_chat, which makes conversations of rows in Alpaca's columns"
        raise UserError(f"data: sources that are trained on in different ways cannot be mixed: {listed}. {advice}")
    (kind,) = kinds
    if model_task is not None and (model_task == "seq_cls") != (kind == "classification"):
        expected = "classification rows" if model_task == "seq_cls" else "text to generate"
        raise UserError(f"data: model.task is {model_task}, which takes {expected}, got {kind} ({KIND_MEANING[kind]})")
    if method is not None and model_task != "seq_cls" and kind not in METHODS[method].rows:
        # rows for KTO are prompts and completions to all others
        first, given = loaded[0].rows[0], source_fields(sources[0]).get("format", "auto")
        fitting = {kind, *(["unpaired"] if preferences.is_unpaired(first) else [])}
        others = [name for name, one in METHODS.items() if fitting & set(one.rows)]
        remedy = f"; set training.method: {' or '.join(others)}, or rewrite the rows" if others else ""
        if given != "auto" and fitting_formats(first, method) in (["preference"], ["unpaired"]):
            remedy = f"; leave format: {given} out, by which they are read so"
        taken = " or ".join(f"{name} ({KIND_MEANING[name]})" for name in METHODS[method].rows)
        raise UserError(
            f"data: training.method is {method}, which takes {taken}; got {kind} ({KIND_MEANING[kind]}){remedy}"
        )
    if kind == "classification" and any(isinstance(record["label"], float) for record in records):
        records = [{**record, "label": float(record["label"])} for record in records]
    # One column list for all: a source without tools stands beside one that has them.
    columns = dict.fromkeys(key for record in records for key in record)
    try:
        return Dataset.from_dict({key: [record.get(key) for record in records] for key in columns}), kind  # pyright: ignore[reportReturnType]
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        if form is None:
            raise
        raise UserError(
            "data: the rows' other columns, which a reward of your own is given, are of different types in different "
            f"rows ({first_line(error)[:200]}); write them alike, or remove them"
        ) from error


def _check_prompts(data_format: str, where: str) -> None:
    if data_format not in ("auto", "prompts"):
        raise UserError(
            f"{where}: format is {data_format}, but rows are read as prompts (training.method: grpo); leave it out"
        )
