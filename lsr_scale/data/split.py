"""Held-out rows by hash (`data.validation_split`): a row's side depends on what it says and on nothing else.

So equal rows are on one side, and a row stays on its side when rows, sources or processes are added, taken away or
reordered. `datasets`' own `train_test_split` draws by position.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lsr_scale.errors import UserError

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
    places = [_place(row) for row in dataset]  # pyright: ignore[reportArgumentType]
    distinct = sorted(set(places))
    if len(distinct) < 2:
        raise UserError(
            f"data.validation_split: all {len(places):,} rows are equal, so none can be held out; give rows that "
            "differ, or leave it out"
        )
    bound = min(max(share, distinct[1]), distinct[-1])  # held out are those below it: the first at least, not the last
    held_out = [place < bound for place in places]
    return _rows(dataset, [not held for held in held_out]), _rows(dataset, held_out)


def _place(row: dict[str, Any]) -> float:
    """Return a number from 0 to 1 for a row by its text; of one with a label, by what is to be classified.

    Where a row stands (`row`, of prompts) does not count: that is another once its file is moved or has a line more.
    """
    content = {name: value for name, value in row.items() if name not in ("label", "row")}
    text = json.dumps(_without_nulls(content), sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _without_nulls(value: Any) -> Any:
    """Leave out what is null: a table has a column for what only rows of another source have."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows(dataset: "Dataset", wanted: list[bool]) -> "Dataset":
    """Return rows as a table of their own: `Dataset.select` keeps all of them beside a list of indices."""
    from datasets import Dataset

    return Dataset(dataset.data.table.filter(wanted))
