"""The embedded conversations `builtin:chat`: a help desk that answers questions on this package.

What `help_desk.yaml` says no base model can know, so that a short training shows in what the model answers.
"""

from functools import cache
from importlib import resources
from typing import Any

import yaml

from lsr_scale.errors import UserError, did_you_mean

SPLITS = ("train", "heldout")


@cache
def rows(split: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of a split, `{"messages": [{"role", "content"}, ...]}`.

    Raises:
        UserError: for an unknown split.
    """
    if split not in SPLITS:
        hint = did_you_mean(split, SPLITS)
        raise UserError(f"builtin:chat: split must be 'train' or 'heldout', got {split!r}; {hint}")
    text = resources.files("lsr_scale.data").joinpath("help_desk.yaml").read_text(encoding="utf-8")
    return tuple(_row(entry) for entry in yaml.safe_load(text)[split])


def _row(entry: Any) -> dict[str, Any]:
    system, turns = (entry["system"], entry["turns"]) if isinstance(entry, dict) else (None, entry)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}
