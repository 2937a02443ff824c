r"""The answer in a text, as the solutions of GSM8K and MATH write it, and when two answers are the same.

In this order: what stands behind the last `####` (arXiv 2110.14168), else in the last `\boxed{...}` (arXiv 2103.03874),
else the last number. Behind `####` and in a box a number is read where there is one, and the text itself where there is
none. Numbers are compared exactly, as fractions: 42, 42.0, $42, 1,234 and 1234, 1/2 and 0.5, 1e5 and 100000.
"""

import re
from fractions import Fraction

# a sign only where it does not stand behind another character: 24-12 ends in 12
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\w|\.\d)|\s*/\s*\d+)?",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d{1,40})\s*\}\s*\{\s*(\d{1,40})\s*\}")
_EXPONENT = re.compile(r"(?<=[\d.])[eE](?=[-+]?\d)", re.ASCII)
_MAX_DIGITS = 200
_MARKUP = re.compile(r"\\(?:text|mathrm|left|right|,|!|;|\s)|[\s{}$]")

Answer = Fraction | str


def find_answer(text: str) -> Answer | None:
    """Return the answer in a text: a number, a text where none stands at the place for it, None without either."""
    for place in (_behind_marks(text), _boxed(text)):
        if place is not None:
            numbers = _numbers(place)
            words = _MARKUP.sub("", place).rstrip(".").casefold()
            return numbers[0] if numbers and _is_a_number(place) else words or None
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _behind_marks(text: str) -> str | None:
    before, marks, behind = text.rpartition("####")
    del before
    behind = behind.strip().partition("\n")[0]
    return behind if marks and behind else None


def _boxed(text: str) -> str | None:
    r"""Return what stands in the last whole `\boxed{...}`, whose braces may hold others."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 0, start + len("\\boxed")
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[begin + 1 : place] or None
        start = text.rfind("\\boxed{", 0, start)
    return None


def _is_a_number(text: str) -> bool:
    """Tell a number with its unit (`$42`, `42 dollars`, `1/2`) from an expression with numbers in it, such as x+1."""
    plain = _EXPONENT.sub("", _LATEX_FRACTION.sub(r"\1/\2", text))
    return re.search(r"[A-Za-z\\]\s*[-+*/^=(]|[-+*/^=(]\s*[A-Za-z\\]|[\^=]", plain) is None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(_LATEX_FRACTION.sub(r"\1/\2", text)):
        over, _, under = match[0].replace("$", "").replace(",", "").replace(" ", "").partition("/")
        if len(match[0]) > _MAX_DIGITS or (under and not int(under)):
            continue
        found.append(Fraction(over) / int(under or 1))
    return found
