"""Held-out rows by hash (`data.validation_split`): a row's side depends on what it says and on nothing else; and which
rows that are given as held out are trained on.

So equal rows are on one side, and a row stays on its side when rows, sources or processes are added, taken away or
reordered. `datasets`' own `train_test_split` draws by position.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lsr_scale.errors import UserError
from lsr_scale.units import amount

if TYPE_CHECKING:
    from datasets import Dataset


def split_by_hash(dataset: "Dataset", share: float) -> tuple["Dataset", "Dataset"]:
    """Return the rows to train on and those held out, each in the order that they had.

    Either side has a row: where the hashes of all are on one side, as with few rows, the nearest to the other goes
    there.

    Args:
        dataset: What `build_dataset` returns.
        share: Of the distinct rows, about so many are held out, between 0 and 1.

    Raises:
        UserError: if all rows are equal.
    """
    places = [_place(row) for row in _iterate(dataset)]
    distinct = sorted(set(places))
    if len(distinct) < 2:
        alike = f"all {len(places):,} rows are equal" if len(places) > 1 else "there is one row"
        raise UserError(
            f"data.validation_split: {alike}, so none can be held out; give rows that differ, or leave it out"
        )
    bound = min(max(share, distinct[1]), distinct[-1])  # held out are those below it: the first at least, not the last
    held_out = [place < bound for place in places]
    return _rows(dataset, [not held for held in held_out]), _rows(dataset, held_out)


def note_shared(train: "Dataset", held_out: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[str]:
    """Return, in a line for each part, how many held-out rows are trained on: nothing where none is.

    Args:
        train: The rows to train on.
        held_out: The parts' rows by what they are called ("data.validation"), converted as those to train on are.
    """
    keys = {where: [_key(row) for row in rows] for where, rows in held_out.items()}
    wanted = {key for part in keys.values() for key in part}
    # the held-out rows' alone are kept: those to train on may be many
    found = wanted.intersection(map(_key, _iterate(train) if wanted else ()))
    shared = {where: sum(key in found for key in part) for where, part in keys.items()}
    return [
        f"{where}: shares {count:,} of {amount(len(keys[where]), 'row')} with data.train: what is measured on them "
        "tells what was memorized; remove them from one of the two"
        for where, count in shared.items()
        if count
    ]


# Where a row stands (`row`, of prompts) does not count: that is another once its file is moved or has a line more. Nor
# does a label: what is to be classified may have another one elsewhere.
_NO_CONTENT = ("label", "row")


def _place(row: Mapping[str, Any]) -> float:
    """Return a number from 0 to 1 for a row by its content, the same in every process and release."""
    content = {name: value for name, value in row.items() if name not in _NO_CONTENT}
    text = json.dumps(_without_nulls(content), sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _key(row: Mapping[str, Any]) -> int:
    """Return a number for a row by its content, the same in this process alone: at a third of the time of `_place`."""
    return hash(_hashable({name: value for name, value in row.items() if name not in _NO_CONTENT}))


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((name, _hashable(item)) for name, item in value.items() if item is not None))
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _iterate(dataset: "Dataset") -> Iterator[dict[str, Any]]:
    """Yield rows by batches: `Dataset`'s own iteration takes ten times as long."""
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        yield from batch.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def _without_nulls(value: Any) -> Any:
    """Leave out what is null: a table has a column for what only rows of another source have."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows(dataset: "Dataset", wanted: list[bool]) -> "Dataset":
    """Return rows as a table of their own: `Dataset.select` keeps all of them beside a list of indices."""
    from datasets import Dataset

    return Dataset(dataset.data.table.filter(wanted))
