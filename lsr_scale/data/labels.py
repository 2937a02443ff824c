"""The labels of classification rows: the classes' names in an order that is the same everywhere, or scores.

The order is that of `model.labels`, else of the ClassLabel feature that all training sources share, else numbers by
their value and names by their characters. Nothing is guessed: labels that differ in case or spaces only, labels of
several types, and a label that training does not have are refused by file and line.
"""

import contextlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsr_scale.data.rows import RowError, Rows
from lsr_scale.errors import UserError, did_you_mean, quoted
from lsr_scale.units import amount

Label = str | bool | int | float

_DECIMAL = re.compile(r"[+-]?([0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18})([eE][+-]?[0-9]{1,3})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LARGEST = 2**31
_SHOWN = 12  # labels in a line
_UNLABELLED = "label -1 means unlabelled (official test sets often are); use another split"


@dataclass(frozen=True)
class Labels:
    """What a classifier's rows may have under `label`.

    Attributes:
        names: The classes' names, class 0 first; none for a regression, whose labels are scores.
        fixed: By `model.labels` or `model.num_labels`, not found in the rows: a row may give a class by its number.
        counts: Training rows of each class, where they were counted.
        notes: What a user should know of them, a line each.
    """

    names: tuple[str, ...]
    fixed: bool = True
    counts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, section: Any) -> "Labels":
        """Return the labels of a trained run, whose `model` section (`ModelSection`) has them."""
        return cls(tuple(section.labels or (_numerals(section.num_labels) if section.num_labels > 1 else ())))

    @property
    def num_outputs(self) -> int:
        """Outputs of the model: the classes, or one score."""
        return max(1, len(self.names))

    def encode(self, row: Mapping[str, Any], feature: Sequence[str] | None = None) -> int | float:
        """Return the number of a row's class, or its score.

        Args:
            row: The row.
            feature: The names of its source's ClassLabel feature, whose numbers the row then has.

        Raises:
            RowError: if there is no label, or none of these.
        """
        label = read_label(row, feature)
        number = as_number(label)
        if not self.names:
            if number is None or isinstance(label, bool):
                raise RowError(f"expected a score under 'label' (model.num_labels is 1), got {quoted(label)}")
            return float(_bounded(number))
        text = label_name(label)
        for name in (str(label), text):
            if name in self.names:
                return self.names.index(name)
        numbered = all(_INTEGER.fullmatch(name) for name in self.names)
        if number is not None and self.fixed and not numbered and number in range(len(self.names)):
            return int(number)
        if number == -1:
            raise RowError(_UNLABELLED)
        if self.fixed and self.names == _numerals(len(self.names)):
            raise RowError(
                f"has the label {quoted(label)}, but model.num_labels is {len(self.names)}: labels go from 0 to "
                f"{len(self.names) - 1}; set num_labels, or 1 for scores (regression)"
            )
        known = did_you_mean(text, self.names) if len(self.names) > _SHOWN else f"there are: {', '.join(self.names)}"
        whose = "is none of model.labels" if self.fixed else "is none of data.train's"
        raise RowError(f"the label {quoted(label)} {whose}; {known}; correct it, or list all labels in model.labels")

    def name(self, label: float) -> str:
        """Return the name of the class of that number, or a score as it is."""
        return self.names[int(label)] if self.names else f"{label:g}"

    def describe(self) -> str:
        """Return them in a line, each class with its number of training rows where they were counted."""
        if not self.names:
            return "labels: scores (regression)"
        counts = [f" ({count:,})" for count in self.counts] or [""] * len(self.names)
        shown = [f"{name}{count}" for name, count in zip(self.names, counts, strict=True)]
        rest = f", ... {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return f"labels: {len(shown)} classes: {', '.join(shown[:_SHOWN])}{rest}"


def read_label(row: Mapping[str, Any], feature: Sequence[str] | None = None) -> Label:
    """Return a row's label without the spaces around it; one that is missing, or no single value, is refused."""
    value = row.get("label")
    if isinstance(value, list | tuple | set):
        raise RowError(
            f"expected one label under 'label', got several, {quoted(value)}: a row has one class here (multi-label "
            "classification is not supported); write one label a row"
        )
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        got = "nothing" if value is None else quoted(value)
        raise RowError(f"expected a label (a class, or a score) under 'label', got {got}; label the row, or remove it")
    if not isinstance(value, str | bool | int | float):
        raise RowError(
            f"expected a class's name or number, or a score, under 'label', got {type(value).__name__} {quoted(value)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"expected a label that is finite and below {_LARGEST:g}, got {value!r}; label the row")
    if feature is not None and isinstance(value, int):
        if value == -1:
            raise RowError(_UNLABELLED)
        if value not in range(len(feature)):
            raise RowError(f"has the label {quoted(value)}, but its ClassLabel feature has {len(feature)} names")
        return feature[value].strip()
    return value.strip() if isinstance(value, str) else value


def as_number(label: Label) -> int | float | None:
    """Return a label as a number, None for a name; a table may write a class's number as text, or as 1.0."""
    if isinstance(label, str):
        if _INTEGER.fullmatch(label):
            return int(label)
        return float(label) if _DECIMAL.fullmatch(label) else None
    return label


def number_of(row: Mapping[str, Any]) -> int | float:
    """Return a label that is a number as it stands: for rows that belong to no run.

    Raises:
        RowError: if it is none, or means that there is none.
    """
    label = read_label(row)
    number = as_number(label)
    if number is None:
        raise RowError(f"expected a class number (or a score) under 'label', got {quoted(label)}")
    if number == -1 and isinstance(number, int):
        raise RowError(_UNLABELLED)
    return _bounded(number)


def _bounded(number: int | float) -> int | float:
    if not abs(number) < _LARGEST:
        raise RowError(f"expected a label that is finite and below {_LARGEST:g}, got {quoted(number)}")
    return number


def label_name(label: Label) -> str:
    """Return the name of the class that a label means: `true` for True, `1` for 1 and 1.0."""
    if isinstance(label, bool):
        return str(label).lower()
    number = as_number(label)
    if number is None or (isinstance(number, float) and not number.is_integer()):
        return str(label)
    return str(int(number)) if abs(number) < _LARGEST else str(label)[:80]


def find_labels(sources: Sequence[Rows], labels: Sequence[str] | None, num_labels: int | None) -> Labels:
    """Return the labels of a run.

    Args:
        sources: Its training rows.
        labels: `model.labels`, the names in their order; None finds them in the rows.
        num_labels: `model.num_labels`: how many there are, 1 for scores. Labels that are numbers then go from 0 on.

    Raises:
        UserError: naming the row whose label is missing, of another type than those before it, or spelt in another way;
            or where there is one class only, or not as many as `num_labels`.
    """
    if num_labels == 1:
        return Labels(())
    found = _Found(sources, one_type=labels is None)
    if labels is not None or (found.are_numbers and num_labels is not None):
        return found.labels(tuple(labels or _numerals(num_labels or 0)), fixed=True)
    if found.are_numbers and found.has_decimals:
        note = "the labels are numbers with a decimal point, so they are scores (a regression)"
        return Labels((), notes=(f"{note}; for classes set model.num_labels",))
    names: tuple[str, ...] = found.feature or tuple(sorted(found.counts, key=int if found.are_numbers else None))
    if found.are_numbers and "-1" in names:
        raise UserError(
            f"{found.first['-1']}: {_UNLABELLED}, or list it as a class: model.labels: [{', '.join(names)}]"
        )
    if len(names) < 2:
        raise UserError(
            f"data.train: every row has the label {', '.join(names)!r}; a classifier needs two classes or more: add "
            "rows of the others, or list all labels in model.labels"
        )
    if num_labels is not None and len(names) != num_labels:
        raise UserError(
            f"data.train: has {len(names)} labels ({', '.join(names)[:200]}), but model.num_labels is {num_labels}; "
            "leave it out, or list all labels in model.labels"
        )
    if not found.are_numbers and not found.feature:
        _check_spelling(found.first)
    return found.labels(names, fixed=False)


class _Found:
    """The labels of training rows: how many rows each has, where it stands first, and of which type they are.

    A number that is written as text, as a CSV file has them, is a number beside numbers and a name beside names.
    """

    def __init__(self, sources: Sequence[Rows], one_type: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.has_decimals = False
        counts: Counter[Label] = Counter()
        first: dict[Label, str] = {}
        types: dict[str, tuple[str, Label]] = {}  # with the first row of each
        spaced: list[str] = []
        for rows in sources:
            for index, row in enumerate(rows.rows):
                try:
                    label = read_label(row, rows.label_names)
                except RowError as error:
                    raise UserError(f"{rows.where(index)}: {error} (read as classification)") from None
                number = as_number(label)
                kind = "number as text" if isinstance(label, str) and number is not None else _TYPES[type(label)]
                label = str(label).lower() if isinstance(label, bool) else label  # True is 1 to a dictionary
                counts[label] += 1
                self.has_decimals |= isinstance(number, float)
                if label not in first:
                    first[label] = rows.where(index)
                if kind not in types:
                    types[kind] = rows.where(index), label
                if isinstance(row["label"], str) and row["label"] != row["label"].strip():
                    spaced.append(rows.where(index))
        if one_type:
            _check_types(types)
        self.are_numbers = set(types) <= {"number", "number as text"}
        for label, count in counts.items():
            name = label_name(label) if self.are_numbers else str(label)  # of 007 beside names the zeros stay
            self.counts[name] += count
            self.first.setdefault(name, first[label])
        features = {rows.label_names for rows in sources}
        shared = next(iter(features)) if len(features) == 1 else None
        self.feature = tuple(name.strip() for name in shared) if shared else None
        self.notes = []
        if spaced:
            number = amount(len(spaced), "label")
            self.notes.append(f"spaces at the ends of {number} are left out here; the first: {spaced[0]}")

    def labels(self, names: tuple[str, ...], fixed: bool) -> Labels:
        """Return these classes with their numbers of rows, and notes on what is odd about them."""
        notes, num_rows = list(self.notes), sum(self.counts.values())
        labels = Labels(names, fixed)
        counts = [0] * len(names)
        for name, count in self.counts.items():
            with contextlib.suppress(RowError):  # told by its row when the rows are converted
                counts[int(labels.encode({"label": name}))] += count
        if without := [name for name, count in zip(names, counts, strict=True) if not count]:
            notes.append(f"no training row has the label {', '.join(without)[:200]}; nothing teaches it")
        if len(names) > max(20, num_rows // 2):
            notes.append(
                f"{len(names):,} classes for {amount(num_rows, 'row')}: is label the right column? for scores, set "
                "model.num_labels: 1"
            )
        return Labels(names, fixed, tuple(counts), tuple(notes))


_TYPES: dict[type, str] = {str: "name", bool: "true or false", int: "number", float: "number"}


def _check_types(types: Mapping[str, tuple[str, Label]]) -> None:
    """Refuse labels of several types; `types` has the place and the label of the first of each."""
    apart = [kind for kind in types if kind != "number as text" or "true or false" in types]
    if len(apart) > 1:
        (before, first), (where, label) = types[apart[0]], types[apart[1]]
        raise UserError(
            f"{where}: the label {quoted(label)} ({apart[1]}) stands beside {quoted(first)} ({apart[0]}; {before}); "
            "write all labels alike"
        )


def _check_spelling(first: Mapping[str, str]) -> None:
    """Refuse names that differ in case, spaces or the encoding of a character only; `first` has their places."""
    spelt: dict[str, str] = {}
    for name, where in first.items():
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if (other := spelt.setdefault(key, name)) != name:
            raise UserError(
                f"{where}: the label {name!r} differs from {other!r} ({first[other]}) in case or spaces only; write "
                "one of them, or list all labels in model.labels"
            )


def _numerals(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))
