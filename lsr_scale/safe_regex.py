"""Regular expressions for module names: those whose matching could backtrack catastrophically are refused.

PEFT passes `target_modules`, `modules_to_save`, the keys of `rank_pattern` and the like to Python's backtracking
matcher, once a module. It has no timeout, and an expression such as `(.*)*x` takes exponential time. So every
expression is first matched here, by a small backtracking matcher that counts its steps: against names as models have
them, and against attack strings made from the expression itself, each of its repetitions pumped. What takes more than
`MAX_STEPS` is refused. Steps are counted, not seconds: the answer is the same on every machine.
"""

import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from re import _constants as codes  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from lsr_scale.errors import UserError, quoted

MAX_LENGTH = 2000
# of one text, and of all; a usual expression takes some hundreds for each, and Python some milliseconds for so many
MAX_STEPS, _MAX_ALL_STEPS = 50_000, 300_000
_REPEATED, _MAX_PUMPED = 20, 240
_NAMES = (
    "model.language_model.layers.10.block_sparse_moe.experts.10.feed_forward.gate_up_proj",
    "base_model.model.vision_tower.vision_model.encoder.layers.10.self_attn.out_proj.base_layer",
    "transformer.h.10.attn.c_attn",
)
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", None))
_CATEGORIES = {
    codes.CATEGORY_DIGIT: str.isdigit,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}
_OPPOSITES = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
}

Items = Sequence[tuple[Any, Any]]


def check_regex(expression: str, where: str, remedy: str = "") -> None:
    """Refuse a text that is no regular expression, or may backtrack catastrophically on module names.

    Args:
        expression: The text.
        where: The option that it is the value of, for the message.
        remedy: What to do about it, where a list of names would not do.

    Raises:
        UserError: if it is no regular expression, or matching it may take too long.
    """
    problem = _problem(expression)
    if problem:
        if remedy:
            problem = f"{problem.partition(';')[0]}; {remedy}"
        raise UserError(f"{where}: {quoted(expression)} {problem}")


@functools.lru_cache(maxsize=4096)
def _problem(expression: str) -> str | None:
    if len(expression) > MAX_LENGTH:
        return f"has {len(expression):,} characters, more than the {MAX_LENGTH:,} of an expression for module names"
    too_long = (
        "is a regular expression that may take for ever to match: repetitions in it match the same text in many ways; "
        "write it with fewer of them, or a list of names"
    )
    try:
        re.compile(expression)
        items = parser.parse(expression)
        # the shortest way through, the longest, and a few by chance, always the same ones
        picks = [_shortest, _longest, *(random.Random(seed).choice for seed in range(4))]
        pumped = [text for pick in picks for text in _pumped(items, pick)]
        steps = 0
        for text in dict.fromkeys([*_NAMES, *(f"{text[-_MAX_PUMPED:]}!" for text in pumped)]):
            steps += _Matcher(text).count(items)
            if steps > _MAX_ALL_STEPS:
                return too_long
    except _TooManyStepsError:
        return too_long
    except RecursionError:
        return too_long
    except (re.error, OverflowError) as error:
        return f"is no regular expression ({error}); write a list of names, such as [q_proj, v_proj], or all-linear"
    return None


class _TooManyStepsError(Exception):
    pass


class _Matcher:
    """Enumerates all ways to match a parsed expression from the start of a text, as a backtracking matcher does.

    Lookbehinds and backreferences consume no characters here, and no step.
    """

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, 0

    def count(self, items: Items) -> int:
        """Return the number of steps that all ways to match take; raise _TooManyStepsError beyond `MAX_STEPS`."""
        for _ in self._sequence(items, 0, 0):
            pass
        return self.steps

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _TooManyStepsError

    def _sequence(self, items: Items, index: int, at: int) -> Iterator[int]:
        self._step()
        if index == len(items):
            yield at
            return
        for middle in self._item(items[index], at):
            yield from self._sequence(items, index + 1, middle)

    def _item(self, item: tuple[Any, Any], at: int) -> Iterator[int]:
        code, value = item
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            if at < len(self.text) and _matches(code, value, self.text[at]):
                yield at + 1
        elif code == codes.BRANCH:
            for way in value[1]:
                yield from self._sequence(way, 0, at)
        elif code in _REPEATS:
            yield from self._repeat(value, 0, at)
        elif _group_items(code, value) is not None:
            yield from self._sequence(_group_items(code, value), 0, at)
        elif code in (codes.ASSERT, codes.ASSERT_NOT) and value[0] > 0:
            if any(True for _ in self._sequence(value[1], 0, at)) == (code == codes.ASSERT):
                yield at
        elif code == codes.AT and value in (codes.AT_END, codes.AT_END_STRING):
            if at == len(self.text):
                yield at
        else:
            yield at

    def _repeat(self, value: tuple[Any, Any, Items], count: int, at: int) -> Iterator[int]:
        self._step()
        low, high, body = value
        if count < high:
            for middle in self._sequence(body, 0, at):
                if middle > at or count < low:  # as in Python, an empty match is not repeated
                    yield from self._repeat(value, count + 1, middle)
        if count >= low:
            yield at


def _group_items(code: Any, value: Any) -> Any:
    """Return the items of a group, None for other items."""
    if code == codes.SUBPATTERN:
        return value[-1]
    return value if code == getattr(codes, "ATOMIC_GROUP", None) else None


def _matches(code: Any, value: Any, char: str) -> bool:
    if code == codes.ANY:
        return char != "\n"
    if code == codes.IN:
        negated = value[0][0] == codes.NEGATE
        return negated != any(_matches(kind, inner, char) for kind, inner in value[negated:])
    if code == codes.RANGE:
        return value[0] <= ord(char) <= value[1]
    if code == codes.CATEGORY:
        return not _CATEGORIES[_OPPOSITES[value]](char) if value in _OPPOSITES else _CATEGORIES[value](char)
    return (ord(char) == value) == (code == codes.LITERAL)


def _shortest(ways: list[str]) -> str:
    return min(ways, key=len)


def _longest(ways: list[str]) -> str:
    return max(ways, key=len)


def _pumped(items: Items, pick: Callable[[list[str]], str], before: str = "") -> Iterator[str]:
    """Yield an attack string for each repetition: a text that leads to it, and then what it repeats, many times.

    `pick` chooses among the texts of alternatives.
    """
    for item in items:
        code, value = item
        if code in _REPEATS:
            yield before + _REPEATED * (_sample(value[2], pick) or "a")
            yield from _pumped(value[2], pick, before)
        elif code == codes.BRANCH:
            for way in value[1]:
                yield from _pumped(way, pick, before)
        elif _group_items(code, value) is not None:
            yield from _pumped(_group_items(code, value), pick, before)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            yield from _pumped(value[1], pick, before)
        before += _sample([item], pick)


def _sample(items: Items, pick: Callable[[list[str]], str]) -> str:
    """Return a text that the items match."""
    text = ""
    for code, value in items:
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            text += next((char for char in _characters(code, value) if _matches(code, value, char)), "a")
        elif code == codes.BRANCH:
            text += pick([_sample(way, pick) for way in value[1]])
        elif code in _REPEATS:
            once = _sample(value[2], pick)
            text += min(value[0], _REPEATED) * once or pick(["", once])
        elif _group_items(code, value) is not None:
            text += _sample(_group_items(code, value), pick)
        text = text[-_MAX_PUMPED:]
    return text


def _characters(code: Any, value: Any) -> list[str]:
    """Return characters of which one item is likely to match one."""
    if code == codes.LITERAL:
        return [chr(value)]
    own = [part for part in value if part[0] in (codes.LITERAL, codes.RANGE)] if code == codes.IN else []
    return [*"a0._-A", *(chr(one if kind == codes.LITERAL else one[0]) for kind, one in own)]
