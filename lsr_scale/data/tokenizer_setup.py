"""The tokenizer is made ready for the data, and the rows are checked against it: padding, chat template, labels."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.formats import KIND_MEANING, Kind, listed_tools
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import render_chat, undefined_names

if TYPE_CHECKING:
    from datasets import Dataset

# around what a chat template has the assistant say
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")


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
    if _GENERATION_TAG.search(tokenizer.get_chat_template()):
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


def row_check(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[dict[str, Any]], None]:
    """Return what `build_dataset` asks of every row: that the chat template takes it.

    Args:
        tokenizer: The run's; None where rows are no conversations.
    """

    def check(row: dict[str, Any]) -> None:
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
