"""Numbers and texts that no setting of a run comes near to: they are refused before anything is made of them."""

import math
import re
from collections.abc import Iterator
from typing import Any

from lsr_scale.config.messages import Problem
from lsr_scale.config.yaml_text import KeyPath
from lsr_scale.option_checks import MAX_RANK

MAX_NUMBER, MAX_LENGTH = 10**15, 10_000


def out_of_bounds(value: Any, path: KeyPath = ()) -> Iterator[Problem]:
    """Yield the numbers and texts that are too large, wherever they stand: used, they would fill the memory."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and len(key) > MAX_LENGTH:
                yield Problem(path, f"a key of {len(key):,} characters; {MAX_LENGTH:,} are the most")
            yield from out_of_bounds(item, (*path, key))
    elif isinstance(value, str):
        if len(value) > MAX_LENGTH:
            yield Problem(path, f"a text of {len(value):,} characters; {MAX_LENGTH:,} are the most")
        elif odd := re.search("[\0\ud800-\udfff]", value):
            yield Problem(path, f"expected text, got one with the character {odd[0]!r} in it; remove it")
    elif isinstance(value, int | float) and MAX_NUMBER < abs(value) != math.inf:
        yield Problem(path, f"expected a number between -1e15 and 1e15, got {_number(value)}")
    elif isinstance(value, int) and path[:1] == ("adapter",) and abs(value) > MAX_RANK:  # splits too
        yield Problem(path, f"expected a number up to {MAX_RANK:,}, got {value!r}")


def _number(value: float) -> str:
    # Python refuses to write out thousands of digits
    return f"one of {value.bit_length():,} bits" if isinstance(value, int) and abs(value) > 10**40 else repr(value)
