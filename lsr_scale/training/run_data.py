"""A run's rows and its tokenizer, read before its model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from lsr_scale.config import RunConfig
from lsr_scale.data import answered_prompts
from lsr_scale.data.formats import Kind, build_dataset, load_source
from lsr_scale.data.labels import Labels
from lsr_scale.data.model_limits import check_model_limits, check_token_id, num_positions, stated_length
from lsr_scale.data.prompts import EncodedPrompt, encode_prompts, load_prompts
from lsr_scale.data.split import note_shared, split_by_hash
from lsr_scale.data.token_counts import TokenCounts
from lsr_scale.data.tokenizer_setup import row_check
from lsr_scale.errors import UserError
from lsr_scale.model import load_config, meta_model, read_tokenizer, tokenizer_of
from lsr_scale.model.tokenizer import has_tokenizer, same_state
from lsr_scale.training.checkpoint import select
from lsr_scale.training.run_labels import labels_of, with_labels
from lsr_scale.training.run_prompts import check_number, prompt_check, prompt_form


@dataclass
class MadeRows:
    """What was made of a run's rows; another trainer of the same rows takes it as it is.

    Attributes:
        notes: What is to be said of the tokenizer, once it is ready and the rows are known to fit the model.
        given: The datasets that the trainer was given, by "train" and "eval".
        tokenized: What it made of them.
        counts: What truncation keeps from the loss; none of a classifier.
    """

    notes: list[str] | None = None
    given: dict[str, Any] = field(default_factory=dict)
    tokenized: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, TokenCounts] = field(default_factory=dict)


@dataclass(frozen=True)
class RunData:
    """The rows of a run, their kind (`KIND_MEANING`), where they came from, and the tokenizer that takes them.

    `sources` holds a list a part ("train", "validation"), of a `Provenance` as a dictionary a source; `prompts` are
    what it completes while it trains; `labels` are a classifier's; `made` is filled by its trainer.
    """

    train: Dataset
    validation: Dataset | None
    kind: Kind
    sources: dict[str, list[dict[str, Any]]]
    tokenizer: Any
    prompts: list[EncodedPrompt] = field(default_factory=list)
    labels: Labels | None = None
    made: MadeRows = field(default_factory=MadeRows)


def read_data(
    run: RunConfig, checkpoint: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> RunData:
    """Return a run's rows and tokenizer.

    Args:
        run: The run.
        checkpoint: What the run resumes from, whose tokenizer it keeps.
        say: Told, in a line each, what a user should know of the tokenizer, a classifier's labels and held-out rows.

    Raises:
        UserError: for a source that cannot be read, rows that do not fit the run's task, its chat template or its
            labels, or validation rows of another kind than those for training.
    """
    prompts = load_prompts(run.eval.prompts)
    parts = {"train": run.data.train, "validation": run.data.validation or []}
    loaded = {part: [load_source(source, part) for source in sources] for part, sources in parts.items()}
    tokenizer = _tokenizer(run, checkpoint, lambda text: say(f"note: {text}"))
    labels = labels_of(run, loaded["train"])
    assistant_only = run.training.get("assistant_only_loss") is not False
    check = row_check(tokenizer, assistant_only, run.training)
    method = run.training["method"] if run.model.task == "causal_lm" else None
    options: dict[str, Any] = {"model_task": run.model.task, "method": method, "check": check, "labels": labels}
    if method == "grpo":
        options |= {"form": prompt_form(run, tokenizer), "check": prompt_check(run, tokenizer)}
    train, kind = build_dataset(parts["train"], "train", loaded=loaded["train"], **options)
    validation = None
    if loaded["validation"]:
        validation, other = build_dataset(parts["validation"], "validation", loaded=loaded["validation"], **options)
        if other != kind:
            raise UserError(
                f"data.validation: is {other}, but data.train is {kind}; give rows of one kind (format: alpaca_chat "
                "makes conversations of rows in Alpaca's columns)"
            )
        for line in note_shared(train, {"data.validation": validation}):  # pyright: ignore[reportArgumentType]
            say(f"note: {line}")
    elif run.data.validation_split:
        train, validation = split_by_hash(train, run.data.validation_split)
        say(
            f"held out by hash: {len(validation):,} of {len(train) + len(validation):,} rows "
            f"(data.validation_split: {run.data.validation_split:g})"
        )
    sources = {part: [rows.provenance.to_dict() for rows in of_part] for part, of_part in loaded.items()}
    if labels is not None:
        for line in (labels.describe(), *(f"note: {note}" for note in labels.notes)):
            say(line)
    return RunData(train, validation, kind, sources, tokenizer, encode_prompts(prompts, kind, tokenizer), labels)


def check_run_fits(run: RunConfig, data: RunData) -> None:
    """Refuse data that a run's model has no embeddings or positions for, before the model is loaded.

    Raises:
        UserError: naming the row.
    """
    if data.kind in answered_prompts.KINDS:
        check_number(run, len(data.train))
    if (
        data.kind in ("unpaired", "chat_unpaired")
        and len(data.train) < 2
        and run.training.get("loss_type", "kto") == "kto"
    ):
        raise UserError(
            "data.train: one row, and KTO takes its KL from each row's neighbours; add rows, or set loss_type: "
            "apo_zero_unpaired"
        )
    section = with_labels(run, data.labels).model
    model_config = load_config(section.name, section.revision)
    empty = partial(meta_model, model_config, section.task, section.num_labels)
    parts = {"train": data.train, "validation": data.validation}
    given = {name: dataset for name, dataset in parts.items() if dataset is not None}
    check_model_limits(given, data.kind, data.tokenizer, model_config, run.training, empty)
    _check_prompts(run, data, model_config, empty)


def _check_prompts(run: RunConfig, data: RunData, model_config: Any, empty: Callable[[], Any]) -> None:
    """Refuse prompts with tokens that the model lacks, or too long to be completed where a table limits positions."""
    new, stated = run.eval.max_new_tokens, stated_length(model_config)
    longest = max((len(one.ids) for one in data.prompts), default=0)
    positions = num_positions(empty()) if stated is None or longest + new > stated - 2 else None
    for number, one in enumerate(data.prompts, 1):
        where = f"eval.prompts: prompt {number}"
        rows = getattr(model_config.get_text_config(), "vocab_size", None)
        if isinstance(rows, int):
            check_token_id(max(one.ids), rows, data.tokenizer, model_config, where)
        if positions is not None and len(one.ids) + new > positions:
            raise UserError(
                f"{where}: has {len(one.ids):,} tokens, and eval.max_new_tokens is {new:,}, but the model has "
                f"{positions:,} positions; shorten it, or lower eval.max_new_tokens"
            )


def _tokenizer(run: RunConfig, checkpoint: Path | None, note: Callable[[str], None]) -> Any:
    """Return a run's tokenizer: where it resumes, the one that it began with."""
    saved = None if checkpoint is None else select.run_folder_of(checkpoint).tokenizer
    if saved is None or not has_tokenizer(saved):
        return tokenizer_of(run, say=note)
    tokenizer = read_tokenizer(saved)
    try:
        differs = not same_state(tokenizer_of(run, say=lambda text: None), tokenizer)
    except UserError:
        differs = True
    if differs:
        note(
            "the end token, padding or chat template are no longer those that the run began with, or cannot be read; "
            f"it resumes with those in {saved}"
        )
    return tokenizer
