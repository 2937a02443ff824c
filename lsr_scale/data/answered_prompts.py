"""Rows for GRPO: a prompt that the model completes by itself, and the answer that its completions are judged by.

    {"prompt", "answer"}               a text, or a list of messages up to where the assistant answers
    {"question", "answer"}             GSM8K's; a user's turn where the model has a chat template
    {"question", "choices", "answer"}  multiple choice in any known layout: the choices are named behind the question

A row's other columns go to a user's own reward as they stand. `row` is added: where a row stands, for messages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsr_scale.data.conversations import check_no_place, checked_messages, tools_of, turns_of, with_lists, with_system
from lsr_scale.data.rows import Row, RowError, Rows
from lsr_scale.data.task_layouts import Item
from lsr_scale.data.tasks import item_of
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import render_chat

KINDS = {
    "prompts": "raw text, completions judged by training.reward",
    "chat_prompts": "chat template, the assistant's answers judged by training.reward",
}
COLUMNS = ("prompt", "answer", "choices", "row")
_ANSWERS = ("answer", "solution")  # the latter in sets that are made for TRL
# names under which a user's reward is given something else, and columns that TRL's trainer keeps to itself
_TAKEN = ("prompts", "completions", "completion_ids", "row", "trainer_state", "log_extra", "log_metric", "environments")
_KEPT_BACK = ("completion", "image", "images", "environment")


@dataclass(frozen=True)
class PromptForm:
    """How rows become prompts.

    Attributes:
        chat: Questions become a user's turn, for the chat template.
        instruction: Text behind each prompt, in a conversation behind its last turn.
        keeps_columns: Rows keep their other columns, for a user's own reward.
    """

    chat: bool = False
    instruction: str | None = None
    keeps_columns: bool = False


def prompt_records(
    rows: Rows, form: PromptForm, check: Callable[[dict[str, Any]], None] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a source as they are trained on, and their kind.

    Args:
        rows: The rows.
        form: How they become prompts.
        check: Called with every converted row; a RowError that it raises is told with the row's place.

    Raises:
        UserError: naming the row that is no prompt, or is one of text among conversations.
    """
    records, kinds = [], []
    for index, row in enumerate(rows.rows):
        try:
            records.append({**prompt_record(row, form, rows.task), "row": rows.where(index)})
            if check is not None:
                check(records[-1])
        except RowError as error:
            raise UserError(f"{rows.where(index)}: {error} (read as prompts)") from None
        kinds.append("prompts" if isinstance(records[-1]["prompt"], str) else "chat_prompts")
        if kinds[-1] != kinds[0]:
            raise UserError(f"{rows.where(index)}: {kinds[-1]} among rows of kind {kinds[0]}; keep one kind a source")
    return records, kinds[0]


def prompt_record(row: Row, form: PromptForm, task: str | None = None) -> dict[str, Any]:
    """Return a row as it is trained on: `prompt`, `answer`, `choices` (None without), and its other columns.

    Args:
        row: The row.
        form: How it becomes a prompt.
        task: The known task that it is of, if any.

    Raises:
        RowError: for what is no prompt.
    """
    others = _others(row) if form.keeps_columns else {}
    has_prompt = bool(row.keys() & {"prompt", "messages"})
    if not has_prompt and row.keys() <= {*_ANSWERS}:
        raise RowError("expected a text or a list of messages under 'prompt', or a text under 'question', got nothing")
    if not has_prompt and ("choices" in row or "question" not in row):
        item = item_of(row, task)
        record = {"prompt": _question(item, form), "answer": item.choices[item.answer], "choices": list(item.choices)}
    else:
        given = next((row[key] for key in _ANSWERS if row.get(key) is not None), None)
        choices = _choices(row["choices"]) if row.get("choices") is not None else None
        answer = None if given is None else _answer(given, choices)
        record = {"prompt": _prompt(row, form), "answer": answer, "choices": choices}
    return {**others, **record}


def _others(row: Row) -> dict[str, Any]:
    """Return a row's other columns, which a user's reward is given by their names."""
    if clash := sorted(set(_TAKEN).intersection(row)):
        raise RowError(
            f"the column {clash[0]!r} has the name of something that a reward of your own is given; rename it"
        )
    return {key: value for key, value in row.items() if key not in (*COLUMNS, "messages", *_KEPT_BACK)}


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Return a prompt's tokens as TRL's trainer makes them.

    Args:
        tokenizer: The run's.
        prompt: A text, or messages up to where the assistant answers.

    Raises:
        UserError: for messages that the chat template does not take.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = render_chat(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def longest_prompt(dataset: Any, tokenizer: Any) -> int:
    """Return the tokens of the longest prompt of converted rows."""
    return max((len(prompt_ids(tokenizer, prompt)) for prompt in dataset["prompt"]), default=0)


def _question(item: Item, form: PromptForm) -> Any:
    passage = f"{item.passage}\n" if item.passage else ""
    named = f"{item.question.strip()}\nChoices: {', '.join(choice.strip() for choice in item.choices)}"
    if form.chat:
        return [{"role": "user", "content": _instructed(passage + named, form)}]
    return _instructed(f"{passage}Question: {named}", form) + "\nAnswer:"


def _prompt(row: Row, form: PromptForm) -> Any:
    key = next((key for key in ("prompt", "messages") if row.get(key) is not None), "prompt")
    row = with_lists(row, "prompt") if key == "prompt" else {**row, key: turns_of(row)[1]}
    prompt = row.get(key)
    if isinstance(prompt, list):
        return with_system(row, _conversation(row, key, form))
    if isinstance(prompt, str):
        check_no_place(row)
        return _instructed(_filled(prompt, "prompt"), form)
    question = row.get("question")
    if not isinstance(question, str):
        found = "nothing" if prompt is None and question is None else repr(prompt or question)[:60]
        raise RowError(f"expected a text or a list of messages under 'prompt', or a text under 'question', got {found}")
    question = _filled(question, "question")
    if form.chat:
        return with_system(row, [{"role": "user", "content": _instructed(question, form)}])
    check_no_place(row)
    return _instructed(f"Question: {question}", form) + "\nAnswer:"


def _conversation(row: Row, key: str, form: PromptForm) -> list[dict[str, str]]:
    turns = checked_messages(row[key], key)
    extra = {name for turn in turns for name in turn} - {"role", "content"}
    if extra or tools_of(row):
        raise RowError(
            f"{', '.join(sorted(extra)) or 'tools'} under {key!r}: prompts for training.method: grpo hold roles and "
            "contents alone, as no tool is called while the model completes them; remove it"
        )
    if len(turns) > 1 and turns[-1]["role"] == "assistant" and key == "messages":
        turns = turns[:-1]  # the answer of a row for supervised training
    if turns[-1]["role"] == "assistant":
        raise RowError(f"expected messages that the assistant answers under {key!r}, got its own turn at the end")
    if form.instruction:
        turns[-1]["content"] = _instructed(turns[-1]["content"], form)
    return turns


def _instructed(text: str, form: PromptForm) -> str:
    return f"{text}\n{form.instruction}" if form.instruction else text


def _filled(text: str, key: str) -> str:
    if not text.strip():
        raise RowError(f"expected a text under {key!r}, got an empty one")
    return text


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one.strip() for one in value):
        raise RowError(f"expected a list of at least two texts under 'choices', got {value!r:.60}")
    return value


def _answer(value: Any, choices: list[str] | None) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"expected a text or a number under 'answer', got {value!r:.60}")
    if choices is None:
        return str(value)
    if isinstance(value, int) and 0 <= value < len(choices):
        return choices[value]
    if value not in choices:
        raise RowError(f"expected one of the choices under 'answer', or its number from 0 on, got {value!r:.60}")
    return str(value)
