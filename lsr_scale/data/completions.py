"""Prompts with chosen and rejected completions -> tokens, as TRL's trainers make them, and how many of them are cut.

The trainers tokenize by themselves; this is for what is told of rows before, and tests compare the two. Converted
conversations hold tool calls and tools as JSON, which the trainers know nothing of: `RowTokenizer` reads it for those
of DPO and KTO, `as_texts` for ORPO's, which takes no tools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsr_scale.data.assistant_spans import render
from lsr_scale.data.chat_tokens import code_digest
from lsr_scale.data.conversations import as_messages, listed_tools
from lsr_scale.data.preferences import COMPLETIONS
from lsr_scale.data.token_counts import TokenCounts, count_tokens, counted_rows
from lsr_scale.units import amount

if TYPE_CHECKING:
    from datasets import Dataset

_IGNORED = -100


def rendered(row: Mapping[str, Any], kind: str, tokenizer: Any) -> tuple[str, dict[str, str]]:
    """Return the prompt of a converted conversation as the chat template writes it, and all of it by completion.

    Args:
        row: A converted row.
        kind: Its kind, a key of `COMPLETIONS`.
        tokenizer: The run's.

    Raises:
        UserError: if the template fails.
    """
    prompt, tools = as_messages(row["prompt"]), listed_tools(row.get("tools"))
    before = render(tokenizer, prompt, tools, add_generation_prompt=True)
    return before, {name: render(tokenizer, [*prompt, *as_messages(row[name])], tools) for name in COMPLETIONS[kind]}


@dataclass(frozen=True)
class RowTokenizer:
    """A tokenizer, as the trainers of DPO and KTO ask one, that takes the messages of converted rows.

    Attributes:
        tokenizer: The run's.
        code: A digest of the code that makes the tokens, by which cached ones are found.
    """

    tokenizer: Any
    code: str

    def __call__(self, text: str) -> Any:
        """Tokenize a text."""
        return self.tokenizer(text=text)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, **options: Any
    ) -> Any:
        """Tokenize a conversation."""
        prompts = options.get("add_generation_prompt", False)
        text = render(self.tokenizer, as_messages(messages), tools, add_generation_prompt=prompts)
        return self.tokenizer(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.tokenizer.decode(ids)


class TokenizesRows:
    """TRL's preparation of rows, of converted ones with tool calls too; goes before TRL's trainer of DPO or KTO."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepare: Any = super()._prepare_dataset  # pyright: ignore[reportAttributeAccessIssue]
        return prepare(dataset, RowTokenizer(processing_class, code_digest(__file__)), args, dataset_name)


def as_texts(dataset: "Dataset", tokenizer: Any, num_proc: int | None = None) -> "Dataset":
    """Return pairs as the texts that the chat template writes; those that are texts stay as they are."""
    if isinstance(dataset[0]["prompt"], str):
        return dataset
    options = {"tokenizer": tokenizer, "code": code_digest(__file__)}
    return dataset.map(_texts, fn_kwargs=options, remove_columns=dataset.column_names, num_proc=num_proc)


def _texts(row: Mapping[str, Any], tokenizer: Any, code: str) -> dict[str, str]:
    before, whole = rendered(row, "chat_preference", tokenizer)
    start = min(_common(before, text) for text in whole.values())
    return {"prompt": before[:start], **{name: text[start:] for name, text in whole.items()}}


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
        before, texts = rendered(row, kind, tokenizer)
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
        f"{where}: of {alike:,} in {amount(len(samples[0]), 'row')}, chosen and rejected have the same tokens within "
        f"training.max_length ({limit}): nothing is preferred; raise it, or remove them"
    ]


def _note_one_class(where: str, labels: Any) -> list[str]:
    """Note that KTO has nothing to contrast."""
    kinds = set(labels)
    if len(kinds) > 1:
        return []
    only, other = ("desirable", "undesirable") if kinds == {True} else ("undesirable", "desirable")
    return [f"{where}: every row is {only}, and KTO contrasts both kinds; add {other} ones"]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many first tokens, or characters, two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
