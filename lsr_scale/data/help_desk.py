"""The embedded conversations `builtin:chat`: a help desk that answers questions on this package.

What `help_desk.yaml` says no base model can know, so that a short training shows in what the model answers.
"""

from functools import cache
from typing import Any

from lsr_scale.data.embedded import check_split, read_table


@cache
def rows(split: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of a split, `{"messages": [{"role", "content"}, ...]}`.

    Raises:
        UserError: for an unknown split.
    """
    check_split("builtin:chat", split)
    return tuple(_row(entry) for entry in read_table("help_desk.yaml")[split])


def _row(entry: Any) -> dict[str, Any]:
    system, turns = (entry["system"], entry["turns"]) if isinstance(entry, dict) else (None, entry)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}
