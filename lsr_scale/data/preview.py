"""What the trainer will see: tokens with what is supervised, made by TRL's own preprocessing, never by a copy of it."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.formats import Kind
from lsr_scale.errors import UserError

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
        notes: What a user should know: which token pads, what is appended, what was dropped.
    """

    samples: list[list[TokenView]]
    labels: list[float] | None
    notes: list[str]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: Kind, pad_token: str | None = None) -> list[str]:
    """Give the tokenizer a padding token where it has none, and return what a user should know about it.

    Args:
        tokenizer: Changed in place (its padding token alone).
        kind: What the data is, see `lsr_scale.data.formats.KIND_MEANING`.
        pad_token: The padding token to use.

    Raises:
        UserError: No end-of-sequence token, an unknown padding token, or no chat template for conversations.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if kind in ("messages", "chat_prompt_completion") and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name!r}: the data is conversations, and it has no chat template; set model.chat_template to a "
            "Jinja file, take an instruction-tuned model, or write the rows as prompt and completion"
        )
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


def tokenize_classification(
    dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> "Dataset":
    """Tokenize sentence pairs for a sequence classifier; the columns are the tokenizer's inputs and `labels`.

    Args:
        dataset: Rows with sentence1, sentence2 ("" where there is none) and label.
        tokenizer: Its special tokens stand around and between the sentences.
        max_length: Longer inputs are cut; None takes the tokenizer's own limit.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        second = batch["sentence2"] if any(batch["sentence2"]) else None
        encoded = tokenizer(batch["sentence1"], second, truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    # One call for all rows: whether there is a second sentence must not differ from batch to batch.
    return dataset.map(encode, batched=True, batch_size=None, remove_columns=dataset.column_names)


def view(input_ids: list[int], labels: list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[TokenView]:
    """Pair each token's text with whether it is supervised; `labels` as the trainer has them (-100: no loss)."""
    supervised = [label != -100 for label in labels] if labels is not None else [False] * len(input_ids)
    return [TokenView(i, str(tokenizer.decode([i])), flag) for i, flag in zip(input_ids, supervised, strict=True)]


def preview(
    dataset: "Dataset",
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 3,
    training: Mapping[str, Any] | None = None,
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

    Raises:
        UserError: The tokenizer cannot take this kind of data, or no row keeps a supervised token.
    """
    options = {name: training[name] for name in PREPROCESSING if training and training.get(name) is not None}
    if training and "max_length" in training:
        options["max_length"] = training["max_length"]  # None means no limit, not the default
    if "eos_token" in options:
        tokenizer.eos_token = options["eos_token"]
    notes = prepare_tokenizer(tokenizer, kind, options.pop("pad_token", None))
    head = dataset.select(range(min(num_samples, len(dataset))))
    if kind == "classification":
        encoded = tokenize_classification(head, tokenizer, options.get("max_length"))
        notes.append("The label is the target; no token is.")
        return Preview([view(row["input_ids"], None, tokenizer) for row in encoded], list(encoded["labels"]), notes)  # pyright: ignore
    rows = _as_trained(head, tokenizer, options)
    if kind in ("prompt_completion", "text"):
        notes.append(
            f"The trainer appends the end-of-sequence token {tokenizer.eos_token!r}; scoring never looks at it."
        )
    if kind == "messages" and not options.get("assistant_only_loss"):
        notes.append("Every turn is supervised; training.assistant_only_loss: true keeps to the assistant's.")
    if len(rows) < len(head):
        num_dropped, limit = len(head) - len(rows), options.get("max_length", "default")
        notes.append(f"{num_dropped} of {len(head)} rows are dropped: max_length ({limit}) cuts off all supervision.")
    if not rows:
        raise UserError("data: no supervised token is left in these rows; raise training.max_length")
    return Preview([view(row["input_ids"], row["labels"], tokenizer) for row in rows], None, notes)


def _as_trained(head: "Dataset", tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> list[Any]:
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
    return list(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
