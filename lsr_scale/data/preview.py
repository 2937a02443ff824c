"""What the trainer will see: tokens with what is supervised, made by TRL's own preprocessing, never by a copy of it."""

import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.formats import KIND_MEANING, Kind, listed_tools
from lsr_scale.data.tally import spaced, tally
from lsr_scale.data.tasks import RowError
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import render_chat, undefined_names

if TYPE_CHECKING:
    from datasets import Dataset

# The fields of SFTConfig that decide how a row becomes tokens and labels.
PREPROCESSING = (
    "max_length",
    "truncation_mode",
    "dataset_text_field",
    "completion_only_loss",
    "assistant_only_loss",
    "eos_token",
    "pad_token",
    "chat_template_path",
)


ROWS_COUNTED = 5_000
# bytes of a character in UTF-8, which are as many tokens at most
_MOST_PARTS = 4
# around what a chat template has the assistant say
_MARK = re.compile(r"\{%-?\s*generation\b")


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
        counts: A line for the training and one for the validation rows: how many, and what of them is lost.
    """

    samples: list[list[TokenView]]
    labels: list[float] | None
    notes: list[str]
    counts: list[str]


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kind: Kind, pad_token: str | None = None, assistant_only: bool = False
) -> list[str]:
    """Give the tokenizer a padding token where it has none, and return what a user should know about it.

    Args:
        tokenizer: Changed in place (its padding token alone).
        kind: What the data is, see `lsr_scale.data.formats.KIND_MEANING`.
        pad_token: The padding token to use.
        assistant_only: Only what the assistant says is to be supervised (`training.assistant_only_loss`).

    Raises:
        UserError: No end-of-sequence token, an unknown padding token, no chat template for conversations, or one that
            does not mark what the assistant says.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if kind in ("messages", "chat_prompt_completion") and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name!r}: the data is conversations, and it has no chat template; set model.chat_template to a "
            "Jinja file, take an instruction-tuned model, or write the rows as prompt and completion"
        )
    if assistant_only:
        _check_marks_assistant(tokenizer, kind)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"tokenizer {name!r}: the padding token {pad_token!r} is not in its vocabulary")
        tokenizer.pad_token = pad_token
    if kind == "classification" and tokenizer.pad_token is not None:
        return []  # BERT's tokenizers have no end-of-sequence token, and a classifier needs none
    if tokenizer.eos_token is None:
        raise UserError(
            f"tokenizer {name!r}: it has no end-of-sequence token, which ends every training text; "
            "set training.eos_token to one of its tokens"
        )
    if tokenizer.pad_token is not None:
        return []
    tokenizer.pad_token = tokenizer.eos_token
    return [
        f"The tokenizer has no padding token: its end-of-sequence token {tokenizer.eos_token!r} is used. "
        "Padding carries no loss and no attention, so nothing else changes."
    ]


def _check_marks_assistant(tokenizer: Any, kind: Kind) -> None:
    """Raise where neither the chat template nor TRL, for one that it knows, tells the assistant's tokens."""
    from trl.chat_template_utils import get_training_chat_template

    where = "training.assistant_only_loss"
    if kind not in ("messages", "chat_prompt_completion"):
        raise UserError(f"{where}: the data is {kind} ({KIND_MEANING[kind]}), no conversations; leave it out")
    if _MARK.search(tokenizer.get_chat_template()):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        raise UserError(
            f"{where}: the chat template does not tell which tokens are the assistant's; put {{% generation %}} and "
            "{% endgeneration %} around the assistant's text and end token in a copy of it, and set "
            "model.chat_template to that, or leave assistant_only_loss out to learn every turn"
        ) from None


def template_notes(dataset: "Dataset", tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what is to be said of how the chat template writes the first row, where rows are conversations."""
    name = next((name for name in ("messages", "prompt") if name in dataset.column_names), None)
    if name is None or not isinstance(dataset[0][name], list):
        return []
    return [
        f"the chat template prints {missing[:60]!r}, which nothing defines, so nothing stands there; correct the name "
        "in a copy of it and set model.chat_template to that"
        for missing in undefined_names(tokenizer, dataset[0][name])
    ]


def row_check(tokenizer: PreTrainedTokenizerBase | None, num_labels: int | None) -> Callable[[dict[str, Any]], None]:
    """Return what `build_dataset` asks of every row: that the chat template takes it, that its label has an output.

    Args:
        tokenizer: The run's; None where rows are no conversations.
        num_labels: Classes of a classifier; 1 is regression.
    """

    def check(row: dict[str, Any]) -> None:
        if "label" in row and num_labels not in (None, 1):
            label = row["label"]
            # otherwise it would be an index error, which on a GPU ends the process's use of it
            if (isinstance(label, float) and not label.is_integer()) or not 0 <= label < num_labels:
                raise RowError(
                    f"has the label {label}, but model.num_labels is {num_labels}: labels go from 0 to "
                    f"{num_labels - 1}; set num_labels, or 1 for scores (regression)"
                )
        messages = row["messages"] if "messages" in row else row.get("prompt")
        # that there is no template is told once, for all rows
        if not isinstance(messages, list) or tokenizer is None or not tokenizer.chat_template:
            return
        tools = listed_tools(row.get("tools"))
        try:
            if "prompt" in row:
                render_chat(tokenizer, messages, tools=tools, add_generation_prompt=True)
                messages = [*messages, *row["completion"]]
            render_chat(tokenizer, messages, tools=tools)
        except UserError as error:
            raise RowError(str(error)) from None

    return check


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


def _some(where: str, dataset: "Dataset") -> tuple["Dataset", str]:
    """Return the rows that are counted, all or, of many, some evenly spaced ones, and in words which."""
    some = dataset.select(spaced(len(dataset), ROWS_COUNTED))
    return some, where if len(some) == len(dataset) else f"{where} (evenly spaced, of {len(dataset):,})"


def count_classification(
    where: str, dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[str, list[str]]:
    """Return a line and notes on how many of a classifier's rows are longer than `max_length`, as for texts."""
    some, where_counted = _some(where, dataset)
    limit = tokenizer.model_max_length if max_length is None else max_length
    lengths = [len(ids) for ids in tokenizer(*_sentences(some[:]), truncation=False, verbose=False).input_ids]  # pyright: ignore
    cut = sum(length > limit for length in lengths)
    line = f"{where_counted}: {len(some):,} rows, {cut:,} cut"
    note = f"{where}: training.max_length ({limit}) cuts {cut:,} of {len(some):,} rows; raise it, or shorten the rows"
    return line, [note] if cut else []


def view(input_ids: list[int], labels: list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[TokenView]:
    """Pair each token's text with whether it is supervised; `labels` as the trainer has them (-100: no loss)."""
    supervised = [label != -100 for label in labels] if labels is not None else [False] * len(input_ids)
    return [TokenView(*token) for token in zip(input_ids, _texts(input_ids, tokenizer), supervised, strict=True)]


def _texts(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; of a character that several make up, the last one has it, the others ""."""
    texts, parts = [], []
    for i in input_ids:
        parts.append(i)
        text = str(tokenizer.decode(parts))
        if text.endswith("\ufffd") and len(parts) < _MOST_PARTS:
            texts.append("")
        else:
            texts.append(text)
            parts = []
    if parts:
        texts[-1] = str(tokenizer.decode(parts))  # cut within a character
    return texts


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
    assistant_only = bool(options.get("assistant_only_loss"))
    notes = prepare_tokenizer(tokenizer, kind, options.pop("pad_token", None), assistant_only)
    notes += template_notes(dataset, tokenizer)
    parts = [("data.train", dataset), *([("data.validation", validation)] if validation is not None else [])]
    head = dataset.select(range(min(num_samples, len(dataset))))
    if kind == "classification":
        encoded = tokenize_classification(head, tokenizer, options.get("max_length"))
        notes.append("The label is the target; no token is.")
        counted = [count_classification(*part, tokenizer, options.get("max_length")) for part in parts]
        samples = [view(row["input_ids"], None, tokenizer) for row in encoded]  # pyright: ignore
        return Preview(samples, list(encoded["labels"]), *_joined(notes, counted))
    rows = _as_trained(head, tokenizer, options)
    if kind in ("prompt_completion", "text"):
        notes.append(
            f"The trainer appends the end-of-sequence token {tokenizer.eos_token!r}; scoring never looks at it."
        )
    if kind == "messages" and not assistant_only:
        notes.append("Every turn is supervised; training.assistant_only_loss: true keeps to the assistant's.")
    if len(rows) < len(head):
        num_dropped, limit = len(head) - len(rows), options.get("max_length", "default")
        notes.append(f"{num_dropped} of {len(head)} rows are dropped: max_length ({limit}) cuts off all supervision.")
    if not len(rows):
        raise UserError("data: no supervised token is left in these rows; raise training.max_length")
    told = {"max_length": _default_length(), **(training or {})}
    counted = [_count(*part, tokenizer, options, told) for part in parts]
    samples = [view(row["input_ids"], row["labels"], tokenizer) for row in rows]  # pyright: ignore
    return Preview(samples, None, *_joined(notes, counted))


def _joined(notes: list[str], counted: list[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
    """Return the notes with those of the counts, and the counts' lines."""
    return [*notes, *(note for _, found in counted for note in found)], [line for line, _ in counted]


def _count(
    where: str,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    training: Mapping[str, Any],
) -> tuple[str, list[str]]:
    """Return a line of counts and what is to be said of them, for all rows or, of many, some evenly spaced ones."""
    some, where_counted = _some(where, dataset)
    whole = _as_trained(some, tokenizer, {**options, "max_length": None})
    counted = tally(whole, tokenizer, training)
    return f"{where_counted}: {counted.line()}", counted.notes(where, tokenizer, training)


def _default_length() -> int | None:
    from trl import SFTConfig

    return SFTConfig.max_length


def _as_trained(head: "Dataset", tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> "Dataset":
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

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
            trainer = SFTTrainer(LlamaForCausalLM(tiny), arguments, train_dataset=head, processing_class=tokenizer)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"data: the trainer cannot prepare these rows: {error}") from error
    finally:
        if not had_bars:
            datasets.enable_progress_bars()
    return trainer.train_dataset  # pyright: ignore[reportReturnType]
