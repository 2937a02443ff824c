"""Prompts with chosen and rejected completions -> tokens, as TRL's trainers make them, and how many of them are cut.

The trainers tokenize by themselves; this is for what is told of rows before, and tests compare the two.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lsr_scale.data.assistant_spans import render
from lsr_scale.data.preferences import COMPLETIONS
from lsr_scale.data.token_counts import TokenCounts, count_tokens, counted_rows

if TYPE_CHECKING:
    from datasets import Dataset

_IGNORED = -100


def tokenize_completions(
    row: Mapping[str, Any], kind: str, tokenizer: Any, method: str = "dpo"
) -> dict[str, tuple[list[int], list[int]]]:
    """Return the tokens of a row's prompt and completion, not truncated, for each of its completions by its column.

    A completion begins where its tokens with the prompt's differ from the prompt's alone, in any of the completions.

    Args:
        row: A converted row.
        kind: Its kind, a key of `COMPLETIONS`.
        tokenizer: The run's.
        method: `training.method`; ORPO's trainer puts the tokenizer's own first and last token around every row, of
            conversations too.
    """
    prompt, of_orpo = row["prompt"], method == "orpo"
    if isinstance(prompt, str):
        ends = "" if of_orpo else tokenizer.eos_token
        texts = {name: prompt + row[name] + ("" if row[name].endswith(ends) else ends) for name in COMPLETIONS[kind]}
        before = prompt
    else:
        texts = {name: render(tokenizer, [*prompt, *row[name]], None) for name in COMPLETIONS[kind]}
        before = render(tokenizer, prompt, None, add_generation_prompt=True)
    special = isinstance(prompt, str) and not of_orpo

    def encode(text: str, end: Any = None) -> list[int]:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if of_orpo and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    alone = encode(before)
    whole = {name: encode(text, tokenizer.eos_token_id if of_orpo else None) for name, text in texts.items()}
    start = min(_common(alone, ids) for ids in whole.values())
    return {name: (ids[:start], ids[start:]) for name, ids in whole.items()}


def as_trained(
    dataset: "Dataset", kind: str, tokenizer: Any, training: Mapping[str, Any]
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Return input ids and labels (-100 in the prompt) of every row, not truncated, by the completions' columns."""
    samples: dict[str, list[tuple[list[int], list[int]]]] = {name: [] for name in COMPLETIONS[kind]}
    for row in dataset:
        for name, (prompt, ids) in tokenize_completions(row, kind, tokenizer, training["method"]).items():  # pyright: ignore
            samples[name].append(([*prompt, *ids], [_IGNORED] * len(prompt) + ids))
    return samples


def count_completions(
    where: str, dataset: "Dataset", kind: str, tokenizer: Any, training: Mapping[str, Any]
) -> list[tuple[str, TokenCounts, list[str]]]:
    """Return for each column of completions what was counted, the counts, and what a user should know of them.

    Args:
        where: What the rows are, such as "data.train".
        dataset: Converted rows; of many, evenly spaced ones are counted.
        kind: Their kind.
        tokenizer: The run's.
        training: The run's training arguments.
    """
    from datasets import Dataset

    some, counted = counted_rows(where, dataset)
    found, by_name = [], as_trained(some, kind, tokenizer, training)
    for name, samples in by_name.items():
        ids, labels = (list(column) for column in zip(*samples, strict=True))
        counts = count_tokens(Dataset.from_dict({"input_ids": ids, "labels": labels}), tokenizer, training)  # pyright: ignore
        notes = counts.notes(f"{where}, {name}", tokenizer, training)
        found.append((f"{counted}, {name}", counts, notes))
    found[0][2].extend(_note_alike(where, list(by_name.values()), training))
    if "label" in dataset.column_names:
        found[0][2].extend(_note_one_class(where, dataset["label"]))
    return found


def _note_alike(where: str, samples: list[list[tuple[list[int], list[int]]]], training: Mapping[str, Any]) -> list[str]:
    """Note pairs that are cut to the same tokens."""
    limit = training.get("max_length")
    cut = slice(-limit, None) if limit and training.get("truncation_mode") == "keep_end" else slice(limit)
    alike = sum(all(ids[cut] == row[0][0][cut] for ids, _ in row) for row in zip(*samples, strict=True))
    if len(samples) == 1 or not alike:
        return []
    return [
        f"{where}: of {alike:,} in {len(samples[0]):,} rows, chosen and rejected have the same tokens within "
        f"training.max_length ({limit}): nothing is preferred; raise it, or remove them"
    ]


def _note_one_class(where: str, labels: Any) -> list[str]:
    """Note that KTO has nothing to contrast."""
    kinds = set(labels)
    if len(kinds) > 1:
        return []
    only, other = ("desirable", "undesirable") if kinds == {True} else ("undesirable", "desirable")
    return [f"{where}: all {len(labels):,} rows are {only}, and KTO contrasts both kinds; add {other} ones"]


def _common(one: list[int], other: list[int]) -> int:
    """Return how many first tokens two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
