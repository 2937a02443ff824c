"""Rows in Alpaca's columns -> rows of the package's own, as texts in Stanford's template or as conversations.

    {"instruction", "input", "output"}                  also Dolly's context and response, and prompt or query
    {"instruction", "input", "chosen", "rejected"}      a preference
    {"instruction", "input", "output", "kto_tag"}       unpaired

Beside any of them `history`, the turns before as `[[user, assistant], ...]`, `system` and `tools`: for these the
template has no place, so rows with one become conversations, and all others of their source too.
"""

from typing import Any

from lsr_scale.data.conversations import read_json
from lsr_scale.data.rows import Row, RowError, filled_text_of, text_of

INSTRUCTIONS = ("instruction", "prompt", "query")
OUTPUTS = ("output", "response")

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITHOUT_PLACE = ("history", "system", "tools")
_NOTHING = (None, "", "[]", [])


def has_preference(row: Row) -> bool:
    """Tell whether a row prefers one text to another as the answer to an instruction."""
    answers = [row.get("chosen"), row.get("rejected")]
    asks = "prompt" not in row and any(name in row for name in INSTRUCTIONS)
    return asks and any(isinstance(one, str) for one in answers) and all(isinstance(one, str | None) for one in answers)


def is_conversation(row: Row) -> bool:
    """Tell whether a row has something for which Stanford's template has no place."""
    return any(row.get(name) not in _NOTHING for name in _WITHOUT_PLACE)


def target_of(row: Row, taken: tuple[str, ...]) -> str:
    """Return what rows like this one become: "preference", "unpaired" or "completion".

    Args:
        row: The first of a source.
        taken: The kinds of rows that the training method takes.
    """
    if row.keys() & {"chosen", "rejected"} and ("preference" in taken or not row.keys() & set(OUTPUTS)):
        return "preference"
    return "unpaired" if "unpaired" in taken and row.keys() & {"label", "kto_tag"} else "completion"


def own_row(row: Row, target: str, chat: bool) -> dict[str, Any]:
    """Return a row as one of prompt and completion, of messages, of a preference or unpaired.

    Args:
        row: The row.
        target: From `target_of`.
        chat: It becomes a conversation, in place of texts in the template.

    Raises:
        RowError: for what is missing, or has no place in the template.
    """
    if target == "preference":
        answers = {name: filled_text_of(row, name) for name in ("chosen", "rejected")}
    else:
        answers = {"completion": filled_text_of(row, *OUTPUTS)}
    instruction = text_of(row, *INSTRUCTIONS)
    context = next((text_of(row, key) for key in ("input", "context") if row.get(key)), "")
    label = {name: row[name] for name in ("label", "kto_tag") if name in row}
    if not chat:
        if found := [name for name in _WITHOUT_PLACE if row.get(name) not in _NOTHING]:
            raise RowError(
                f"{', '.join(map(repr, found))}: Stanford's template has no place for it; set format: alpaca_chat, "
                "which makes conversations of the source's rows, or remove it"
            )
        template = WITH_INPUT if context.strip() else WITHOUT_INPUT
        return {"prompt": template.format(instruction=instruction, input=context), **answers, **label}
    asked = "\n".join(part for part in (instruction, context) if part.strip())
    if not asked:
        raise RowError("expected a text under 'instruction', got an empty one")
    turns = [*_history(row), {"role": "user", "content": asked}]
    replies = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    beside = {name: row[name] for name in ("system", "tools") if name in row}
    if target == "completion":  # the answers in the history are learned too
        return {"messages": [*turns, *replies["completion"]], **beside}
    return {"prompt": turns, **replies, **label, **beside}


def _history(row: Row) -> list[dict[str, str]]:
    """Return the turns before a row's instruction."""
    history = row.get("history")
    if history in _NOTHING:
        return []
    pairs = read_json(history, "history") if isinstance(history, str) else history
    if not isinstance(pairs, list):
        raise RowError(f"expected [[user, assistant], ...] under 'history', got {history!r:.60}")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"expected [user, assistant], two texts, as history[{index}], got {pair!r:.60}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns
