"""How many rows and tokens truncation keeps from the loss, counted before it; preview and train tell it."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState

from lsr_scale.data.assistant_spans import render
from lsr_scale.data.chat_tokens import CONVERSATIONS_COLUMNS, is_conversations, tokenize_conversations
from lsr_scale.data.conversations import as_messages, has_no_weight, is_empty, listed_tools
from lsr_scale.units import amount

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_COUNTED = 5_000  # of a preview
MAX_PROMPTS_COMPARED = 2_000
_BATCH_ROWS = 5_000


@dataclass(frozen=True)
class TokenCounts:
    """Counts of tokenized rows.

    Attributes:
        rows: Rows counted.
        truncated: Rows longer than max_length.
        unsupervised: Rows of which truncation leaves no supervised token; the trainer leaves them out.
        supervised: Supervised tokens before truncation.
        supervised_lost: Those that truncation removes.
        ends: Supervised end-of-sequence tokens before truncation.
        ends_lost: Those that truncation removes.
        without_end: Rows that had no supervised end-of-sequence token in the first place.
        doubled: Rows with two end-of-sequence tokens, or two tokens of the beginning, side by side.
        prompts: Prompts whose tokens were compared with those of prompt and completion together.
        retokenized: Those whose last tokens are others there.
        lengths: How many rows have so many tokens, before truncation.
        turns: Turns of conversations, of any role.
        assistant_turns: Those that are the assistant's and may be learned.
        empty_turns: The assistant's without a text, which are not.
    """

    rows: int = 0
    truncated: int = 0
    unsupervised: int = 0
    supervised: int = 0
    supervised_lost: int = 0
    ends: int = 0
    ends_lost: int = 0
    without_end: int = 0
    doubled: int = 0
    prompts: int = 0
    retokenized: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    turns: int = 0
    assistant_turns: int = 0
    empty_turns: int = 0

    @property
    def tokens(self) -> int:
        """Tokens before truncation."""
        return sum(length * rows for length, rows in self.lengths.items())

    def percentile(self, share: float) -> int:
        """Return the length that so large a share of rows does not exceed: 0.5 is the median, 1 the longest."""
        seen = 0
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen >= share * self.rows:
                return length
        return 0

    def supervision(self) -> str:
        """Return in words how much of conversations is supervised."""
        turns = f"{amount(self.assistant_turns, 'assistant turn')} supervised of {amount(self.turns, 'turn')}"
        return (
            f"{turns}, {self.supervised:,} of {amount(self.tokens, 'token')} ({_share(self.supervised, self.tokens)})"
        )

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        """Return the counts of both."""
        return TokenCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def line(self) -> str:
        """Return in a line what is lost."""
        if not self.supervised:  # a classifier's
            return f"{amount(self.rows, 'row')}, {self.truncated:,} cut"
        lost = _share(self.supervised_lost, self.supervised)
        return (
            f"{amount(self.rows, 'row')}, {self.truncated:,} cut, {self.unsupervised:,} left out; "
            f"lost: {lost} of {self.supervised:,} supervised tokens, {self.ends_lost:,} of {self.ends:,} end tokens"
        )

    def notes(self, where: str, tokenizer: Any, training: Mapping[str, Any]) -> list[str]:
        """Return in sentences what a user should know: nothing where nothing is lost.

        Args:
            where: What the rows are, such as "data.train".
            tokenizer: The run's.
            training: The run's training arguments.
        """
        notes, limit = [], training.get("max_length")
        of_rows = f"of {amount(self.rows, 'row')}"
        if self.truncated and _packs_in_parts(training):
            notes.append(
                f"{where}: packing splits {self.truncated:,} {of_rows}, longer than training.max_length ({limit}), "
                "in parts"
            )
        elif self.truncated:
            lost, left = _share(self.supervised_lost, self.supervised), self.supervised - self.supervised_lost
            notes.append(
                f"{where}: training.max_length ({limit}) cuts {self.truncated:,} {of_rows}: "
                f"{lost} of the supervised tokens are lost ({left:,} of {self.supervised:,} are left), and "
                f"{self.ends_lost:,} of {self.ends:,} end tokens; raise it, or shorten the rows"
            )
        if self.without_end:
            notes.append(
                f"{where}: {self.without_end:,} {of_rows} without the end token {tokenizer.eos_token!r}, at which "
                "generation stops, in what is learned; set training.eos_token to the token with which the chat "
                "template ends a turn"
            )
        if self.empty_turns:
            notes.append(f"{where}: not learned, as without a text: {self.empty_turns:,} of the assistant's turns")
        if self.unsupervised and training.get("packing") and not _packs_in_parts(training):
            notes.append(
                f"{where}: {self.unsupervised:,} {of_rows} left out: training.max_length ({limit}) cuts off all "
                "that is to be learned of them; raise it"
            )
        if self.doubled:
            either = f"{tokenizer.bos_token!r} or {tokenizer.eos_token!r}"
            notes.append(
                f"{where}: {self.doubled:,} {of_rows} with {either} twice side by side; take it out of the texts (or "
                "the chat template): it is added where it belongs"
            )
        if self.retokenized:
            notes.append(
                f"{where}: the last tokens of {self.retokenized:,} of {amount(self.prompts, 'prompt')} become others "
                "with the completion behind them, so training sees another prompt than generation; end prompts where a "
                "word ends, and write the space that follows in front of the completion"
            )
        return notes


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.3g} %"


def _packs_in_parts(training: Mapping[str, Any]) -> bool:
    """Tell whether a row that is too long continues in the next packed sequence."""
    return bool(training.get("packing")) and training.get("packing_strategy", "bfd") != "bfd"


def count_tokens(dataset: "Dataset", tokenizer: Any, training: Mapping[str, Any]) -> TokenCounts:
    """Count what the trainer will leave of tokenized rows.

    Args:
        dataset: TRL's columns input_ids and labels (or its masks), not truncated yet, beside those of the rows.
        tokenizer: The run's.
        training: The run's training arguments.
    """
    total = TokenCounts()
    names = [name for name in ("input_ids", "labels", "completion_mask") if name in dataset.column_names]
    columns = dataset.select_columns(names).with_format("arrow")
    for start in range(0, len(dataset), _BATCH_ROWS):
        total += _count(columns[start : start + _BATCH_ROWS], tokenizer, training)
    return total + _count_turns(dataset) + _compare_prompts(dataset, tokenizer)


def _count(table: Any, tokenizer: Any, training: Mapping[str, Any]) -> TokenCounts:
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
    limit, fits = training.get("max_length"), np.ones(len(flat), dtype=bool)
    if limit is not None and not _packs_in_parts(training):
        from_end = training.get("truncation_mode") == "keep_end" and not training.get("packing")
        fits = place >= np.repeat(lengths, lengths) - limit if from_end else place < limit
    ends = supervised & (flat == tokenizer.eos_token_id)
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    twice = (flat[1:] == flat[:-1]) & (row[1:] == row[:-1]) & np.isin(flat[1:], special)

    def rows_with(mask: np.ndarray) -> int:
        return len(np.unique(row[mask]))

    return TokenCounts(
        rows=len(lengths),
        truncated=0 if limit is None else int((lengths > limit).sum()),
        unsupervised=rows_with(supervised) - rows_with(supervised & fits),
        supervised=int(supervised.sum()),
        supervised_lost=int((supervised & ~fits).sum()),
        ends=int(ends.sum()),
        ends_lost=int((ends & ~fits).sum()),
        without_end=len(lengths) - rows_with(ends) if tokenizer.eos_token_id is not None else 0,
        doubled=len(np.unique(row[1:][twice])),
        lengths=Counter(lengths.tolist()),
    )


def _count_turns(dataset: "Dataset") -> TokenCounts:
    """Count the turns of conversations; of a prompt and its completion those of the completion may be learned."""
    turns = learned = empty = 0
    for name in CONVERSATIONS_COLUMNS:
        if name not in dataset.column_names or isinstance(dataset[0][name], str):
            continue
        for messages in dataset[name]:
            turns += len(messages)
            if name != "prompt":
                weighed = [turn for turn in messages if turn["role"] == "assistant" and not has_no_weight(turn)]
                of_assistant = [is_empty(turn) for turn in weighed]
                empty, learned = empty + sum(of_assistant), learned + len(of_assistant) - sum(of_assistant)
    return TokenCounts(turns=turns, assistant_turns=learned, empty_turns=empty)


def _compare_prompts(dataset: "Dataset", tokenizer: Any) -> TokenCounts:
    """Compare the tokens of prompts alone with the first of prompt and completion, for evenly spaced rows."""
    if "prompt" not in dataset.column_names:
        return TokenCounts()
    some = dataset.select(evenly_spaced(len(dataset), MAX_PROMPTS_COMPARED))
    prompts = some["prompt"]
    if isinstance(prompts[0], str):
        alone = tokenizer(list(prompts)).input_ids
    else:
        tools = some["tools"] if "tools" in some.column_names else [None] * len(some)
        texts = [
            render(tokenizer, as_messages(prompt), listed_tools(tool), add_generation_prompt=True)
            for prompt, tool in zip(prompts, tools, strict=True)
        ]
        alone = tokenizer(texts, add_special_tokens=False).input_ids
    together = some["input_ids"]
    changed = sum(both[: len(ids)] != ids for ids, both in zip(alone, together, strict=True))
    return TokenCounts(prompts=len(some), retokenized=changed)


def evenly_spaced(length: int, max_count: int) -> range:
    """Return at most so many indices, evenly spaced."""
    return range(0, length, max(1, -(-length // max_count)))


def counted_rows(where: str, dataset: "Dataset") -> tuple["Dataset", str]:
    """Return the rows that are counted, all or, of many, some evenly spaced ones, and in words which."""
    some = dataset.select(evenly_spaced(len(dataset), ROWS_COUNTED))
    return some, where if len(some) == len(dataset) else f"{where} (evenly spaced, of {len(dataset):,})"


class CountsTokens:
    """A mix-in for SFTTrainer: tokenizes conversations, and counts, when rows are tokenized, what is truncated.

    Attributes:
        supervise_assistant: Learn the assistant's turns alone, where rows are conversations.
        rows: What an earlier trainer made of the same rows, and what this one makes (`training.run_data.MadeRows`).
        token_counts: By "train" and "eval".
    """

    supervise_assistant = True
    rows: Any = None
    token_counts: dict[str, TokenCounts]

    def __init__(self, *args: Any, rows: Any = None, **options: Any) -> None:
        self.rows = rows  # before TRL's trainer makes them
        super().__init__(*args, **options)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Tokenize, count, truncate, unless that was done; what comes of it is kept where another trainer finds it."""
        rows, options = self.rows, (processing_class, args, packing, formatting_func, dataset_name)
        if rows is None or dataset is not rows.given.get(dataset_name):
            return self._make_rows(dataset, *options)
        if dataset_name not in rows.tokenized:
            # of arrays a collator makes tensors in a fifth of the time that lists take
            rows.tokenized[dataset_name] = self._make_rows(dataset, *options).with_format("numpy")
            rows.counts |= getattr(self, "token_counts", {})
        self.token_counts = dict(rows.counts)
        return rows.tokenized[dataset_name]

    def _make_rows(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Tokenize, count, truncate: TRL passes over what is done already, so nothing is done twice."""
        prepare: Any = super()._prepare_dataset  # pyright: ignore[reportAttributeAccessIssue]
        if "input_ids" not in dataset.column_names:
            untruncated = copy.copy(args)
            untruncated.max_length, untruncated.shuffle_dataset = None, False
            if is_conversations(dataset):
                with _main_first():
                    dataset = tokenize_conversations(
                        dataset,
                        processing_class,
                        assistant_only=self.supervise_assistant,
                        completion_only=args.completion_only_loss is not False,
                        num_proc=args.dataset_num_proc,
                    )
            dataset = prepare(dataset, processing_class, untruncated, False, formatting_func, dataset_name)
            settings = {**vars(args), "packing": packing}
            counts = count_tokens(dataset, processing_class, settings)
            self.token_counts = {**getattr(self, "token_counts", {}), dataset_name: counts}
            if packing and counts.unsupervised and not _packs_in_parts(settings):
                # it would fill a sequence with what nobody learns from; without packing TRL leaves it out
                dataset = dataset.filter(_keeps_supervised, fn_kwargs={"limit": args.max_length})
        return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)


@contextmanager
def _main_first() -> Iterator[None]:
    """Let the main process write to the cache first, then the first one of each host, as TRL does."""
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def _keeps_supervised(row: Mapping[str, Any], limit: int) -> bool:
    return any(label != -100 for label in row["labels"][:limit])
