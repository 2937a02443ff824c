"""A classifier's rows as tokens, and how many of them truncation shortens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.token_counts import counted_rows

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize_classification(
    dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> "Dataset":
    """Tokenize sentence pairs for a sequence classifier; the columns are the tokenizer's inputs and `labels`.

    Args:
        dataset: Rows with sentence1, sentence2 ("" where there is none) and, but for rows to be classified, label.
        tokenizer: Its special tokens stand around and between the sentences.
        max_length: Longer inputs are cut; None takes the tokenizer's own limit.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(*_sentences(batch), truncation=True, max_length=max_length)
        return {**encoded, **({"labels": batch["label"]} if "label" in batch else {})}

    # One call for all rows: whether there is a second sentence must not differ from batch to batch.
    return dataset.map(encode, batched=True, batch_size=None, remove_columns=dataset.column_names)


def _sentences(rows: Mapping[str, Any]) -> tuple[list[str], list[str] | None]:
    """Return the first and the second sentences of rows; the second are None where no row has one."""
    return list(rows["sentence1"]), list(rows["sentence2"]) if any(rows["sentence2"]) else None


def count_classification(
    where: str,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    encoded: "Dataset | None" = None,
) -> tuple[str, list[str]]:
    """Return a line and notes on how many of a classifier's rows are longer than `max_length`, as for texts.

    Args:
        where: What the rows are, such as "data.train".
        dataset: The rows.
        tokenizer: The run's.
        max_length: As it was given to `tokenize_classification`.
        encoded: What that made of all of the rows; None has some of many rows tokenized here. Only rows that fill the
            limit are tokenized again, without it.
    """
    some, where_counted = counted_rows(where, dataset)
    if encoded is None:
        encoded = tokenize_classification(some, tokenizer, max_length)
    else:
        some, where_counted = dataset, where
    limit = tokenizer.model_max_length if max_length is None else max_length
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) >= limit]
    cut = 0
    if full:
        first, second = _sentences(some[:])  # pyright: ignore
        pairs = [first[index] for index in full], None if second is None else [second[index] for index in full]
        cut = sum(len(ids) > limit for ids in tokenizer(*pairs, truncation=False, verbose=False).input_ids)
    line = f"{where_counted}: {len(some):,} rows, {cut:,} cut"
    note = f"{where}: training.max_length ({limit}) cuts {cut:,} of {len(some):,} rows; raise it, or shorten the rows"
    return line, [note] if cut else []
