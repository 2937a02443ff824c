"""What of the rows never reaches the loss, counted on their tokens before the cut; preview and train tell it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lsr_scale.data.formats import listed_tools

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS_LOOKED_AT = 2_000
_ROWS_AT_ONCE = 5_000


@dataclass(frozen=True)
class Tally:
    """Counts of tokenized rows.

    Attributes:
        rows: Rows counted.
        cut: Rows longer than max_length.
        left_out: Rows of which nothing that is supervised is left.
        supervised: Supervised tokens before the cut.
        supervised_lost: Those behind it.
        ends: Supervised end tokens before the cut.
        ends_lost: Those behind it.
        endless: Rows that had no supervised end token in the first place.
        doubled: Rows with two end tokens, or two tokens of the beginning, side by side.
        prompts: Prompts whose tokens were compared with those of prompt and completion together.
        retokenized: Those whose last tokens are others there.
    """

    rows: int = 0
    cut: int = 0
    left_out: int = 0
    supervised: int = 0
    supervised_lost: int = 0
    ends: int = 0
    ends_lost: int = 0
    endless: int = 0
    doubled: int = 0
    prompts: int = 0
    retokenized: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        """Return the counts of both."""
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def line(self) -> str:
        """Return in a line what is lost."""
        lost = _share(self.supervised_lost, self.supervised)
        return (
            f"{self.rows:,} rows, {self.cut:,} cut, {self.left_out:,} left out; lost: {lost} of {self.supervised:,} "
            f"supervised tokens, {self.ends_lost:,} of {self.ends:,} end tokens"
        )

    def notes(self, where: str, tokenizer: Any, training: Mapping[str, Any]) -> list[str]:
        """Return in sentences what a user should know: nothing where nothing is lost.

        Args:
            where: What the rows are, such as "data.train".
            tokenizer: The run's.
            training: The run's training arguments.
        """
        found, limit = [], training.get("max_length")
        of_rows = f"of {self.rows:,} rows"
        if self.cut and _splits(training):
            found.append(
                f"{where}: packing splits {self.cut:,} {of_rows}, longer than training.max_length ({limit}), in parts"
            )
        elif self.cut:
            lost, left = _share(self.supervised_lost, self.supervised), self.supervised - self.supervised_lost
            found.append(
                f"{where}: training.max_length ({limit}) cuts {self.cut:,} {of_rows}: {lost} of the supervised tokens "
                f"are lost ({left:,} of {self.supervised:,} are left), and {self.ends_lost:,} of {self.ends:,} end "
                "tokens; raise it, or shorten the rows"
            )
        if self.endless:
            found.append(
                f"{where}: {self.endless:,} {of_rows} do not teach the end token {tokenizer.eos_token!r}, at which "
                "generation stops; set training.eos_token to the token with which the chat template ends a turn"
            )
        if self.doubled:
            either = f"{tokenizer.bos_token!r} or {tokenizer.eos_token!r}"
            found.append(
                f"{where}: {self.doubled:,} {of_rows} have {either} twice side by side; take it out of the texts (or "
                "the chat template): it is added where it belongs"
            )
        if self.retokenized:
            found.append(
                f"{where}: the last tokens of {self.retokenized:,} of {self.prompts:,} prompts become others with the "
                "completion behind them, so training sees another prompt than generation; end prompts where a word "
                "ends, and write the space that follows in front of the completion"
            )
        return found


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.3g} %"


def _splits(training: Mapping[str, Any]) -> bool:
    """Tell whether what is too long goes on in the next sequence."""
    return bool(training.get("packing")) and training.get("packing_strategy", "bfd") != "bfd"


def tally(dataset: "Dataset", tokenizer: Any, training: Mapping[str, Any]) -> Tally:
    """Count what the trainer will leave of tokenized rows.

    Args:
        dataset: TRL's columns input_ids and labels (or its masks), not cut yet, beside those of the rows.
        tokenizer: The run's.
        training: The run's training arguments.
    """
    total = Tally()
    wanted = [name for name in ("input_ids", "labels", "completion_mask") if name in dataset.column_names]
    columns = dataset.select_columns(wanted).with_format("arrow")
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        total += _count(columns[start : start + _ROWS_AT_ONCE], tokenizer, training)
    return total + _prompts(dataset, tokenizer)


def _count(table: Any, tokenizer: Any, training: Mapping[str, Any]) -> Tally:
    ids = table["input_ids"].combine_chunks()
    lengths = np.diff(ids.offsets.to_numpy())
    flat = ids.flatten().to_numpy()
    supervised = np.ones(len(flat), dtype=bool)
    if "labels" in table.column_names:
        supervised = table["labels"].combine_chunks().flatten().to_numpy() != -100
    elif "completion_mask" in table.column_names:
        supervised = table["completion_mask"].combine_chunks().flatten().to_numpy() == 1
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    limit, kept = training.get("max_length"), np.ones(len(flat), dtype=bool)
    if limit is not None and not _splits(training):
        from_end = training.get("truncation_mode") == "keep_end" and not training.get("packing")
        kept = place >= np.repeat(lengths, lengths) - limit if from_end else place < limit
    ends = supervised & (flat == tokenizer.eos_token_id)
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    twice = (flat[1:] == flat[:-1]) & (row[1:] == row[:-1]) & np.isin(flat[1:], special)

    def rows_with(mask: np.ndarray) -> int:
        return len(np.unique(row[mask]))

    return Tally(
        rows=len(lengths),
        cut=0 if limit is None else int((lengths > limit).sum()),
        left_out=rows_with(supervised) - rows_with(supervised & kept),
        supervised=int(supervised.sum()),
        supervised_lost=int((supervised & ~kept).sum()),
        ends=int(ends.sum()),
        ends_lost=int((ends & ~kept).sum()),
        endless=len(lengths) - rows_with(ends) if tokenizer.eos_token_id is not None else 0,
        doubled=len(np.unique(row[1:][twice])),
    )


def _prompts(dataset: "Dataset", tokenizer: Any) -> Tally:
    """Compare the tokens of prompts alone with the first of prompt and completion, for evenly spaced rows."""
    if "prompt" not in dataset.column_names:
        return Tally()
    some = dataset.select(spaced(len(dataset), PROMPTS_LOOKED_AT))
    prompts = some["prompt"]
    if isinstance(prompts[0], str):
        alone = tokenizer(list(prompts)).input_ids
    else:
        tools = some["tools"] if "tools" in some.column_names else [None] * len(some)
        alone = [
            tokenizer.apply_chat_template(
                prompt, tools=listed_tools(tool), add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for prompt, tool in zip(prompts, tools, strict=True)
        ]
    together = some["input_ids"]
    changed = sum(whole[: len(ids)] != ids for ids, whole in zip(alone, together, strict=True))
    return Tally(prompts=len(some), retokenized=changed)


def spaced(length: int, most: int) -> range:
    """Return at most so many indices, evenly spaced."""
    return range(0, length, max(1, -(-length // most)))


class TalliesRows:
    """A mix-in for SFTTrainer: counts, when rows become tokens, what is cut off them.

    Attributes:
        tallies: By "train" and "eval".
    """

    tallies: dict[str, Tally]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Tokenize, count, cut: TRL passes over what is done already, so nothing is done twice."""
        prepare: Any = super()._prepare_dataset  # pyright: ignore[reportAttributeAccessIssue]
        if "input_ids" not in dataset.column_names:
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
            counted = {**vars(args), "packing": packing}
            self.tallies = {**getattr(self, "tallies", {}), dataset_name: tally(dataset, processing_class, counted)}
        return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
