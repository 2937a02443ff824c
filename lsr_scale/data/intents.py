"""The embedded classification set `builtin:intents`: hand-written messages to a shop, and what each wants.

Small, so that it trains in minutes on a CPU: it shows that a classifier's run works, and measures nothing else.
"""

from typing import Literal, TypedDict

from lsr_scale.data.embedded import check_split, read_table

Split = Literal["train", "heldout"]


class Row(TypedDict):
    """A message and its intent."""

    text: str
    label: str


def rows(split: Split) -> list[Row]:
    """Return all messages of a split, one of each intent in turn, so that any first n are a balanced sample.

    Args:
        split: `"train"` or `"heldout"`.

    Raises:
        UserError: There is no such split.
    """
    check_split("builtin:intents", split)
    by_intent = {intent: messages[split] for intent, messages in read_table("intents.yaml").items()}
    turns = zip(*([Row(text=text, label=intent) for text in texts] for intent, texts in by_intent.items()), strict=True)
    return [row for turn in turns for row in turn]
