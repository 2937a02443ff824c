"""Whether a model takes what the data becomes: token ids beyond its embedding, rows beyond its positions.

Both are index errors of the first step, which on a GPU end the process's use of it. Rows are made into tokens for this
only where a tokenizer or a length limit could go beyond the model; published models' do not.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedConfig

from lsr_scale.config.training import longest_row
from lsr_scale.data import answered_prompts
from lsr_scale.data.assistant_spans import render
from lsr_scale.data.completions import tokenize_completions
from lsr_scale.data.conversations import listed_tools, messages_of
from lsr_scale.data.formats import Kind
from lsr_scale.data.preferences import COMPLETIONS
from lsr_scale.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_POSITIONS = re.compile(r"(?:.*\.)?(?:\w*positions?_embed\w*|embed_positions|wpe)")


def num_positions(model: Any) -> int | None:
    """Return how many tokens a row may have at most, None where no table of positions limits it (as with RoPE).

    Args:
        model: The model, on whatever device.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            before = getattr(module, "offset", 0)  # OPT and BART leave rows free, RoBERTa begins after its padding's
            before = before or (0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - before
    tables = (buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions"))  # GPT-J, CodeGen
    return next((len(table) for table in tables if table.dim() == 2), None)


def stated_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model's configuration says that it is made for, None where it does not say."""
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    factor = (getattr(text, "rope_parameters", None) or {}).get("factor")
    if not isinstance(stated, int):
        return None
    # some state the length before RoPE was scaled
    return int(stated * max(1, factor)) if isinstance(factor, int | float) else stated


def check_model_limits(
    datasets: Mapping[str, "Dataset"],
    kind: Kind,
    tokenizer: Any,
    config: PreTrainedConfig,
    training: Mapping[str, Any],
    empty: Callable[[], Any],
) -> None:
    """Refuse data with token ids, or lengths, that the model has no rows for, before it is loaded.

    Args:
        datasets: By the name under `data` that the run has for it: "train", "validation".
        kind: What they are, see `build_dataset`.
        tokenizer: The model's, as it will be used.
        config: The model's configuration.
        training: The run's training arguments.
        empty: Makes the model on the meta device.

    Raises:
        UserError: naming the row, and the largest id or the length.
    """
    text = config.get_text_config()
    rows, limit, positions = getattr(text, "vocab_size", None), longest_row(training), None
    completed = training["max_completion_length"] if kind in answered_prompts.KINDS else 0
    if not isinstance(rows, int):
        return
    pad_token = training.get("pad_token") or tokenizer.pad_token
    pad_id = None if pad_token is None else tokenizer.convert_tokens_to_ids(pad_token)
    if pad_id is not None and not 0 <= pad_id < rows:
        raise UserError(
            f"model.name: the padding token {pad_token!r} has the id {pad_id}, but the "
            f"model's embedding has {rows} rows; set pad_token in the tokenizer_config.json of a local copy to a token "
            "below that"
        )
    stated = getattr(text, "max_position_embeddings", None)
    if limit is None or (isinstance(stated, int) and limit > stated - 2):  # RoBERTa's first two are never used
        positions = num_positions(empty())
        if positions is not None and limit is not None and limit <= positions:
            positions = None
    if positions is None and max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    for name, dataset in datasets.items():
        places, tokens = zip(*_tokens(dataset, kind, tokenizer, training), strict=True) if len(dataset) else ((), ())
        longest = max(range(len(tokens)), key=lambda row: len(tokens[row]), default=None)
        if longest is None:
            continue
        highest = max(range(len(tokens)), key=lambda row: max(tokens[row], default=0))
        check_token_id(max(tokens[highest], default=0), rows, tokenizer, config, f"data.{name}: row {places[highest]}")
        if positions is not None and completed and len(tokens[longest]) + completed > positions:
            raise UserError(
                f"data.{name}: row {places[longest]} has {len(tokens[longest])} tokens, and "
                f"training.max_completion_length is {completed}, but {config.name_or_path} has {positions} positions; "
                "lower it, or shorten the prompt"
            )
        if positions is not None and len(tokens[longest]) > positions:
            raise UserError(
                f"data.{name}: row {places[longest]} has {len(tokens[longest])} tokens, but {config.name_or_path} has "
                f"{positions} positions; set training.max_length: {positions}"
            )


def _tokens(
    dataset: "Dataset", kind: Kind, tokenizer: Any, training: Mapping[str, Any]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and token ids of rows as TRL makes them; its trainer would be one too many beside the run's."""
    limit = longest_row(training)
    cut = slice(-limit, None) if limit and training.get("truncation_mode") == "keep_end" else slice(limit)
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token or "")
    for number, row in enumerate(cast(Iterable[dict[str, Any]], dataset), 1):
        if kind in COMPLETIONS:
            for prompt, completion in tokenize_completions(row, kind, tokenizer, training["method"]).values():
                yield number, (prompt + completion)[cut]
            continue
        if kind in answered_prompts.KINDS:
            ids = answered_prompts.prompt_ids(tokenizer, row["prompt"])
        elif kind == "classification":
            ids = tokenizer(row["sentence1"], row["sentence2"] or None, truncation=True, max_length=limit)["input_ids"]
        elif kind in ("messages", "chat_prompt_completion"):
            ids = []
            # what fails the trainer will say better, by row
            with contextlib.suppress(UserError):
                text = render(tokenizer, messages_of(row)[0], listed_tools(row.get("tools")))
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = row["text"] if kind == "text" else row["prompt"] + row["completion"]
            ids = tokenizer(text)["input_ids"]
            ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        yield number, ids[cut]


def check_token_id(largest: int, rows: int, tokenizer: Any, config: Any, where: str) -> None:
    """Refuse a token id beyond an embedding.

    Args:
        largest: The largest id.
        rows: Rows of the embedding.
        tokenizer: Where it is from.
        config: The model's configuration.
        where: Where it stands, for the message.

    Raises:
        UserError: with the command that gives the embedding of a local model more rows.
    """
    if largest < rows:
        return
    name, token = str(config.name_or_path), tokenizer.convert_ids_to_tokens(largest)
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        f"m.resize_token_embeddings({len(tokenizer)}); m.save_pretrained(sys.argv[1])"
    )
    raise UserError(
        f"{where} has the token id {largest} ({token!r}), but the embedding of {name} has {rows} rows: its tokenizer "
        "is of a larger model; take the one that belongs to it, or give a local copy more rows, which start at "
        f"random (train them with adapter.modules_to_save):\npython -c '{code}' {shlex.quote(name)}"
    )
