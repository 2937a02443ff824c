"""A classifier's rows as tokens, and how many of them truncation shortens."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.token_counts import TokenCounts, counted_rows
from lsr_scale.units import amount

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
) -> tuple[str, TokenCounts, list[str]]:
    """Return which rows were counted, their lengths, and notes on those longer than `max_length`, as for texts.

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
    lengths = [len(ids) for ids in encoded["input_ids"]]
    full = [index for index, length in enumerate(lengths) if length >= limit]
    if full:
        first, second = _sentences(some[:])  # pyright: ignore
        pairs = [first[index] for index in full], None if second is None else [second[index] for index in full]
        whole = tokenizer(*pairs, truncation=False, verbose=False).input_ids
        lengths = [length for length in lengths if length < limit] + [len(ids) for ids in whole]
    cut = sum(length > limit for length in lengths)
    counts = TokenCounts(rows=len(some), truncated=cut, lengths=Counter(lengths))
    of_rows = f"{cut:,} of {amount(len(some), 'row')}"
    note = f"{where}: training.max_length ({limit}) cuts {of_rows}; raise it, or shorten the rows"
    return where_counted, counts, [note] if cut else []
