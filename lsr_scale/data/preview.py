"""What the trainer will see: tokens with what is supervised, made by the trainer's own preparation of its rows."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lsr_scale.data import answered_prompts
from lsr_scale.data.answered_prompts import prompt_ids
from lsr_scale.data.classification import count_classification, tokenize_classification
from lsr_scale.data.completions import as_trained, count_completions
from lsr_scale.data.formats import Kind
from lsr_scale.data.preferences import COMPLETIONS
from lsr_scale.data.token_counts import CountsTokens, TokenCounts, count_tokens, counted_rows
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, supervises_assistant, template_notes
from lsr_scale.errors import UserError
from lsr_scale.units import amount

if TYPE_CHECKING:
    from datasets import Dataset

# The fields of SFTConfig that decide how a row becomes tokens and labels.
PREPROCESSING = (
    "max_length",
    "truncation_mode",
    "dataset_text_field",
    "completion_only_loss",
    "eos_token",
    "pad_token",
    "chat_template_path",
)

# tokens that may have to be decoded together for whole characters: a token may end one and begin another
_MAX_PARTS = 16


class TokenView(NamedTuple):
    """One token, and whether the loss looks at it (for classification: never, the label is the target)."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class Preview:
    """Tokenized samples.

    Attributes:
        samples: One list of tokens a row.
        labels: The label of each row for classification data, else None.
        notes: What a user should know: which token pads, what is appended, what was dropped or cut.
        parts: Which rows were counted ("data.train", "data.validation"), and their counts.
        names: Which completion each sample is ("chosen", "rejected"), where rows say which is preferred; of prompts
            the answers that completions are judged by; else [].
    """

    samples: list[list[TokenView]]
    labels: list[float] | None
    notes: list[str]
    parts: list[tuple[str, TokenCounts]]
    names: list[str] = field(default_factory=list)

    @property
    def counts(self) -> list[str]:
        """Return a line for each part: how many rows, and what of them is lost."""
        return [f"{where}: {counts.line()}" for where, counts in self.parts]


def view(input_ids: list[int], labels: list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[TokenView]:
    """Pair each token's text with whether it is supervised; `labels` as the trainer has them (-100: no loss)."""
    supervised = [label != -100 for label in labels] if labels is not None else [False] * len(input_ids)
    return [TokenView(*token) for token in zip(input_ids, _texts(input_ids, tokenizer), supervised, strict=True)]


def _texts(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; of a character that several make up, the last one has it, the others "".

    A token's text is what it adds to that of the tokens before it: alone, one of SentencePiece loses its space.
    """

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    shown, begun = 0, 0  # the tokens up to here are shown; those from here on are decoded together with the next
    for end in range(1, len(input_ids) + 1):
        before, now = decoded(input_ids[begun:shown]), decoded(input_ids[begun:end])
        unfinished = now.endswith("\ufffd") and end < len(input_ids) and end - shown < _MAX_PARTS
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            begun, shown = shown, end
    return texts


def runs(sample: list[TokenView]) -> list[tuple[bool, str]]:
    """Return a sample's text in pieces that are supervised or not, in turn."""
    grouped = groupby(sample, key=lambda token: token.supervised)
    return [(supervised, "".join(token.text for token in tokens)) for supervised, tokens in grouped]


def preview(
    dataset: "Dataset",
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 3,
    training: Mapping[str, Any] | None = None,
    validation: "Dataset | None" = None,
) -> Preview:
    """Tokenize the first rows of a dataset exactly as the trainer would (packing aside, which only glues them).

    Builds TRL's SFTTrainer on a model of a few thousand parameters, on the CPU: call it in a process that does not
    train afterwards.

    Args:
        dataset: From `lsr_scale.data.formats.build_dataset`.
        kind: The dataset's kind, from the same call.
        tokenizer: The model's tokenizer; given a padding token where it has none.
        num_samples: How many rows from the beginning.
        training: The run's training arguments; those of `PREPROCESSING` are heeded.
        validation: The rows whose loss is reported, counted like the others.

    Raises:
        UserError: The tokenizer cannot take this kind of data, or no row keeps a supervised token.
    """
    options = {name: training[name] for name in PREPROCESSING if training and training.get(name) is not None}
    if training and "max_length" in training:
        options["max_length"] = training["max_length"]  # None means no limit, not the default
    wanted = (training or {}).get("assistant_only_loss")
    assistant_only = supervises_assistant(training, kind)
    notes = prepare_tokenizer(tokenizer, kind, options.pop("pad_token", None), wanted)
    notes += template_notes(dataset, tokenizer, assistant_only)
    parts = [("data.train", dataset), *([("data.validation", validation)] if validation is not None else [])]
    head = dataset.select(range(min(num_samples, len(dataset))))
    if kind == "classification":
        encoded = tokenize_classification(head, tokenizer, options.get("max_length"))
        notes.append("The label is the target; no token is.")
        counted = [count_classification(*part, tokenizer, options.get("max_length")) for part in parts]
        samples = [view(row["input_ids"], None, tokenizer) for row in encoded]  # pyright: ignore
        return Preview(samples, list(encoded["labels"]), *_joined(notes, counted))
    if kind in answered_prompts.KINDS:
        return _of_prompts(head, tokenizer, parts, notes)
    if kind in COMPLETIONS:
        return _of_completions(head, kind, tokenizer, training or {}, parts, notes)
    rows = _as_trained(head, tokenizer, options, assistant_only)
    if kind in ("prompt_completion", "text"):
        notes.append(
            f"The trainer appends the end-of-sequence token {tokenizer.eos_token!r}; scoring never looks at it."
        )
    if kind == "messages" and not assistant_only:
        notes.append("Every turn is supervised; without training.assistant_only_loss: false, the assistant's alone.")
    if len(rows) < len(head):
        num_dropped, limit = len(head) - len(rows), options.get("max_length", "default")
        notes.append(
            f"{num_dropped} of {amount(len(head), 'row')} dropped: max_length ({limit}) cuts off all supervision."
        )
    if not len(rows):
        raise UserError("data: no supervised token is left in these rows; raise training.max_length")
    settings = {"max_length": _default_length(), **(training or {})}
    counted = [_count(*part, tokenizer, options, settings, assistant_only) for part in parts]
    samples = [view(row["input_ids"], row["labels"], tokenizer) for row in rows]  # pyright: ignore
    return Preview(samples, None, *_joined(notes, counted))


def _of_completions(
    head: "Dataset",
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
    parts: list[tuple[str, "Dataset"]],
    notes: list[str],
) -> Preview:
    """Return the preview of rows that say which completion is preferred: each completion is a sample."""
    counted = [found for part in parts for found in count_completions(*part, kind, tokenizer, training)]
    limit = training.get("max_length")
    cut = slice(-limit, None) if limit and training.get("truncation_mode") == "keep_end" else slice(limit)
    samples, names = [], []
    by_name = as_trained(head, kind, tokenizer, training)
    for index, row in enumerate(head):
        for name, rows in by_name.items():
            ids, labels = rows[index]
            samples.append(view(ids[cut], labels[cut], tokenizer))
            label = name if "label" not in head.column_names else "desirable" if row["label"] else "undesirable"  # pyright: ignore
            names.append(label)
    return Preview(samples, None, *_joined(notes, counted), names)


def _of_prompts(
    head: "Dataset", tokenizer: PreTrainedTokenizerBase, parts: list[tuple[str, "Dataset"]], notes: list[str]
) -> Preview:
    """Return the preview of rows that the model completes by itself: prompts, each with its answer as its name."""
    counted = []
    for where, dataset in parts:
        some, told = counted_rows(where, dataset)
        lengths = Counter(len(prompt_ids(tokenizer, prompt)) for prompt in some["prompt"])
        counted.append((told, TokenCounts(rows=len(some), lengths=lengths), []))
    samples = [view(prompt_ids(tokenizer, prompt), None, tokenizer) for prompt in head["prompt"]]
    names = ["without an answer" if answer is None else f"answer {answer[-60:]!r}" for answer in head["answer"]]
    return Preview(samples, None, *_joined(notes, counted), names)


Counted = tuple[str, TokenCounts, list[str]]


def _joined(notes: list[str], counted: list[Counted]) -> tuple[list[str], list[tuple[str, TokenCounts]]]:
    """Return the notes with those of the counts, and the counts."""
    found = [note for _, _, of_part in counted for note in of_part]
    return [*notes, *found], [(where, counts) for where, counts, _ in counted]


def _count(
    where: str,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    training: Mapping[str, Any],
    assistant_only: bool,
) -> Counted:
    """Return counts and what is to be said of them, for all rows or, of many, some evenly spaced ones."""
    some, where_counted = counted_rows(where, dataset)
    untruncated = _as_trained(some, tokenizer, {**options, "max_length": None}, assistant_only)
    counts = count_tokens(untruncated, tokenizer, training)
    return where_counted, counts, counts.notes(where, tokenizer, training)


def _default_length() -> int | None:
    from trl import SFTConfig

    return SFTConfig.max_length


def _as_trained(
    head: "Dataset", tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], assistant_only: bool
) -> "Dataset":
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Prepares(CountsTokens, SFTTrainer):
        supervise_assistant = assistant_only

    tiny = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    had_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's own defaults, under names that are going away
            arguments = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none", **options)
            trainer = Prepares(LlamaForCausalLM(tiny), arguments, train_dataset=head, processing_class=tokenizer)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"data: the trainer cannot prepare these rows: {error}") from error
    finally:
        if not had_bars:
            datasets.enable_progress_bars()
    return trainer.train_dataset  # pyright: ignore[reportReturnType]
