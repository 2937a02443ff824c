"""The embedded classification set `builtin:intents`: hand-written messages to a shop, and what each wants.

Small, so that it trains in minutes on a CPU: it shows that a classifier's run works, and measures nothing else.
"""

from importlib import resources
from typing import Literal, TypedDict, get_args

import yaml

from lsr_scale.errors import UserError, did_you_mean

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
    if split not in get_args(Split):
        hint = did_you_mean(str(split), get_args(Split))
        raise UserError(f"builtin:intents: split must be 'train' or 'heldout', got {split!r}; {hint}")
    text = (resources.files("lsr_scale.data") / "intents.yaml").read_text(encoding="utf-8")
    by_intent = {intent: messages[split] for intent, messages in yaml.safe_load(text).items()}
    turns = zip(*([Row(text=text, label=intent) for text in texts] for intent, texts in by_intent.items()), strict=True)
    return [row for turn in turns for row in turn]
