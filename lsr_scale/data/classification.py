"""A classifier's rows as tokens, and how many of them truncation shortens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.token_counts import counted_rows

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize_classification(
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    num_labels: int | None = None,
) -> "Dataset":
    """Tokenize sentence pairs for a sequence classifier; the columns are the tokenizer's inputs and `labels`.

    Args:
        dataset: Rows with sentence1, sentence2 ("" where there is none) and label.
        tokenizer: Its special tokens stand around and between the sentences.
        max_length: Longer inputs are cut; None takes the tokenizer's own limit.
        num_labels: Classes, whose numbers a table may write 1.0; 1, or None, leaves labels as they are.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(*_sentences(batch), truncation=True, max_length=max_length)
        labels = batch["label"] if num_labels in (None, 1) else [int(label) for label in batch["label"]]
        return {**encoded, "labels": labels}

    # One call for all rows: whether there is a second sentence must not differ from batch to batch.
    return dataset.map(encode, batched=True, batch_size=None, remove_columns=dataset.column_names)


def _sentences(rows: Mapping[str, Any]) -> tuple[list[str], list[str] | None]:
    """Return the first and the second sentences of rows; the second are None where no row has one."""
    return list(rows["sentence1"]), list(rows["sentence2"]) if any(rows["sentence2"]) else None


def count_classification(
    where: str, dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[str, list[str]]:
    """Return a line and notes on how many of a classifier's rows are longer than `max_length`, as for texts."""
    some, where_counted = counted_rows(where, dataset)
    limit = tokenizer.model_max_length if max_length is None else max_length
    lengths = [len(ids) for ids in tokenizer(*_sentences(some[:]), truncation=False, verbose=False).input_ids]  # pyright: ignore
    cut = sum(length > limit for length in lengths)
    line = f"{where_counted}: {len(some):,} rows, {cut:,} cut"
    note = f"{where}: training.max_length ({limit}) cuts {cut:,} of {len(some):,} rows; raise it, or shorten the rows"
    return line, [note] if cut else []
