"""Errors that a user can fix, in words: where, what was expected, what was found, what to do."""

import difflib
import re
from collections.abc import Iterable

LOST_PEER = (
    "another process of the run ended or cannot be reached; what it said tells why; resume from the last checkpoint "
    "with --resume auto"
)


# a screen of 24 lines of 80, less what stands around a message
_ROWS, _COLUMNS = 20, 80
_NEARLY = 0.03  # of the likeness of two names, 1 where they are equal
_LONGEST_WORD = 240  # paths are longer than a line of the screen, and are to stay whole
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


class UserError(ValueError):
    """A mistake in a configuration, a file or a call; its message is all that the user needs to see.

    The command line prints it without a traceback and exits with 2. A bug is any other exception. Whatever a message
    quotes, it fits one screen (`one_screen`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_screen(message))


class DoesNotFitError(UserError):
    """A model that does not fit into memory. The command line adds what its command can do about it.

    Attributes:
        on_gpu: It is the GPU's.
    """

    def __init__(self, message: str, on_gpu: bool) -> None:
        super().__init__(message)
        self.on_gpu = on_gpu


_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """Return text with everything that would steer a terminal, or that nobody sees, as its escape; lines and tabs stay.

    So `"\\x1b[2J"` for what clears the screen, `"\\u202e"` for what turns the writing around. The joiners of emoji and
    of scripts such as Persian's stay where they join.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or (c in _JOINERS and not before.isascii()) else escaped(c)
        for before, c in zip(f" {text}", text, strict=False)
    )


def escaped(character: str) -> str:
    """Return a character's escape, as Python writes it."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def without_advice(text: str) -> str:
    """Return what a message says before it says what to do: up to the first semicolon outside of parentheses."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ";" and depth <= 0:
            return text[:index]
    return text


def shortened(text: str, length: int) -> str:
    """Return text of at most so many characters: its two ends where it is longer."""
    if len(text) <= length:
        return text
    ending = length // 3
    return f"{text[: length - ending - 5]} ... {text[-ending:]}"


def quoted(value: object) -> str:
    """Return a value for a message as Python writes it, its beginning where that is long."""
    if isinstance(value, int) and value.bit_length() > 300:
        return "a number of many digits"  # Python refuses to write out thousands
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def one_screen(text: str) -> str:
    """Return a message that fits one screen and shows what it quotes as it stands.

    Long words, such as a value of a thousand digits or a path, and long lines lose their middle. Of many lines the
    first ones are shown and the rest is counted.
    """
    if len(text) <= _COLUMNS:
        return printable(text)
    ends = text if len(text) < 10**6 else shortened(text, 10**6)
    lines = _LONG_WORD.sub(_short_word, printable(ends)).split("\n")
    kept: list[str] = []
    room = _ROWS
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        line = shortened(line, _COLUMNS * min(room, 3 if kept and not last else 8))
        room -= max(1, -(-len(line) // _COLUMNS))
        if room < (0 if last else 1):
            break
        kept.append(line)
    left = len(lines) - len(kept)
    return "\n".join([*kept, f"... and {left} more line{'s' if left > 1 else ''}"] if left else kept)


def _short_word(found: re.Match[str]) -> str:
    return shortened(found[0], _LONGEST_WORD).replace(" ... ", "...")


def did_you_mean(name: str, options: Iterable[str], num_nearest: int = 3, cutoff: float = 0.5) -> str:
    """Return `"did you mean 'a' or 'b'?"` for the options nearest to `name`, or the list of all of them.

    Args:
        name: What was written.
        options: What could have been written.
        num_nearest: How many suggestions at most.
        cutoff: How alike they are at least, of 1.
    """
    known = sorted(set(options))
    if near := nearest(name, known, num_nearest, cutoff):
        return f"did you mean {' or '.join(repr(option) for option in near)}?"
    if len(known) > 20:
        return f"no name that is known here is near it, of {len(known)}"
    return f"valid: {', '.join(known)}" if known else "nothing is valid here"


def nearest(name: str, options: Iterable[str], num_nearest: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return the options nearest to `name`, the best first, and of the others those nearly as near as it.

    Args:
        name: What was written.
        options: What could have been written.
        num_nearest: How many at most.
        cutoff: How alike they are at least, of 1.
    """
    near = difflib.get_close_matches(name, list(options), n=num_nearest, cutoff=cutoff)
    alike = [difflib.SequenceMatcher(None, option, name).ratio() for option in near]
    return [option for option, ratio in zip(near, alike, strict=True) if ratio > alike[0] - _NEARLY]
