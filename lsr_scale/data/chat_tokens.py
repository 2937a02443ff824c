"""Conversations -> token ids and labels, for training and for what `preview` shows of it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsr_scale.data import assistant_spans
from lsr_scale.data.assistant_spans import AssistantSpans, Span, marks_itself, render
from lsr_scale.data.conversations import listed_tools, messages_of

if TYPE_CHECKING:
    from datasets import Dataset

# kinds of rows, and their columns of messages
CONVERSATIONS = ("messages", "chat_prompt_completion")
CONVERSATIONS_COLUMNS = ("messages", "prompt", "completion")
_IGNORED = -100


def is_conversations(dataset: "Dataset") -> bool:
    """Tell whether converted rows are conversations."""
    names = [name for name in CONVERSATIONS_COLUMNS if name in dataset.column_names]
    return bool(names) and len(dataset) > 0 and isinstance(dataset[0][names[-1]], list)


def tokenize_conversations(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    assistant_only: bool = True,
    completion_only: bool = True,
    num_proc: int | None = None,
) -> "Dataset":
    """Return rows of conversations with the columns input_ids and labels, not truncated.

    Args:
        dataset: Converted rows, see `lsr_scale.data.conversations`.
        tokenizer: The run's, with offsets (a fast one).
        assistant_only: Supervise what the assistant says, its end tokens included; False: every token.
        completion_only: Where a row is a prompt and a completion, supervise the completion alone.
        num_proc: Processes.
    """
    options = {
        "tokenizer": tokenizer,
        "assistant_only": assistant_only,
        "completion_only": completion_only,
        "code": code_digest(__file__),
    }
    return dataset.map(_tokenize, batched=True, batch_size=200, fn_kwargs=options, num_proc=num_proc)


def code_digest(file: str) -> str:
    """Return a digest of the code that makes tokens, a module's and what it renders by: cached ones are found by it."""
    files = (Path(file), Path(assistant_spans.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _tokenize(
    batch: Mapping[str, list[Any]], tokenizer: Any, assistant_only: bool, completion_only: bool, code: str
) -> dict[str, list[list[int]]]:
    find = AssistantSpans(tokenizer)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        ids, labels = _row(find, row, assistant_only, completion_only)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return columns


def _row(find: AssistantSpans, row: Mapping[str, Any], assistant_only: bool, completion_only: bool) -> Any:
    messages, learned_from = messages_of(row)
    tools, tokenizer = listed_tools(row.get("tools")), find.tokenizer
    learned_from = learned_from if completion_only else 0
    if not assistant_only:
        ids = tokenizer(render(tokenizer, messages, tools), add_special_tokens=False)["input_ids"]
        start = 0
        if learned_from:
            prompt = render(tokenizer, messages[:learned_from], tools, add_generation_prompt=True)
            start = _common(tokenizer(prompt, add_special_tokens=False)["input_ids"], ids)
        return ids, [_IGNORED] * start + ids[start:]
    text, spans = find.find(messages, tools, learned_from)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, tagged = encoded["input_ids"], marks_itself(tokenizer, tools)
    marked = _inside(encoded["offset_mapping"], spans, tagged)
    return ids, [token if inside else _IGNORED for token, inside in zip(ids, marked, strict=True)]


def _inside(offsets: Sequence[Span], spans: Sequence[Span], tagged: bool) -> list[bool]:
    """Tell for each token whether it is in a span.

    One that begins before a span, where the last characters of the generation prompt are joined with the first ones of
    the text, is not: no generation could begin with it. A template's own marks count as transformers takes them: that
    token too.
    """
    inside, remaining = [], list(reversed(spans))
    for begin, end in offsets:
        while remaining and begin >= remaining[-1][1]:
            remaining.pop()
        inside.append(bool(remaining) and (end > remaining[-1][0] if tagged else begin >= remaining[-1][0]))
    return inside


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
