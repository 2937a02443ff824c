"""The tokenizer is made ready for the data, and the rows are checked against it: padding, chat template, labels."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsr_scale.data.assistant_spans import TRAINING_DATE, AssistantSpans, render
from lsr_scale.data.chat_tokens import CONVERSATIONS, CONVERSATIONS_COLUMNS
from lsr_scale.data.completions import rendered
from lsr_scale.data.conversations import BESIDE_TEXTS, as_messages, has_no_weight, listed_tools, messages_of
from lsr_scale.data.formats import KIND_MEANING, Kind
from lsr_scale.data.preferences import COMPLETIONS, kind_of
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import undefined_names

if TYPE_CHECKING:
    from datasets import Dataset

WITH_TEMPLATE = (*CONVERSATIONS, "chat_preference", "chat_unpaired", "chat_prompts")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kind: Kind, pad_token: str | None = None, assistant_only: bool | None = None
) -> list[str]:
    """Give the tokenizer a padding token where it has none, and return what a user should know about it.

    Args:
        tokenizer: Changed in place (its padding token alone).
        kind: What the data is, see `lsr_scale.data.formats.KIND_MEANING`.
        pad_token: The padding token to use.
        assistant_only: `training.assistant_only_loss`; None is True for conversations.

    Raises:
        UserError: No end-of-sequence token, an unknown padding token, no chat template for conversations, or no way to
            tell which tokens are the assistant's.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if kind in WITH_TEMPLATE and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name!r}: the data is conversations, and it has no chat template; set model.chat_template to a "
            "Jinja file, take an instruction-tuned model, or write the rows as texts"
        )
    if assistant_only or (assistant_only is None and kind in CONVERSATIONS):
        _check_tells_assistant(tokenizer, kind)
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


def supervises_assistant(training: Mapping[str, Any] | None, kind: Kind) -> bool:
    """Tell whether a run learns the assistant's turns alone: it does where rows are conversations, unless told not to.

    Args:
        training: The run's training arguments.
        kind: What the data is.
    """
    return kind in CONVERSATIONS and (training or {}).get("assistant_only_loss") is not False


def _check_tells_assistant(tokenizer: Any, kind: Kind) -> None:
    """Raise where rows are no conversations, or the tokenizer does not tell where in a text its tokens are."""
    where = "training.assistant_only_loss"
    if kind not in CONVERSATIONS:
        raise UserError(f"{where}: the data is {kind} ({KIND_MEANING[kind]}), no conversations; leave it out")
    if not tokenizer.is_fast:
        raise UserError(
            f"{where}: {type(tokenizer).__name__} does not tell where in a text its tokens are; take the model's "
            "tokenizer.json (a fast tokenizer), or set it to false to learn every turn"
        )


def template_notes(dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, assistant_only: bool = False) -> list[str]:
    """Return what is to be said of how the chat template writes the first row, where rows are conversations."""
    row = dataset[0]
    if "chosen" in row:
        row = {"prompt": row["prompt"], "completion": row["chosen"]}
    if not {"messages", "completion"} & set(row) or isinstance(row.get("prompt"), str):
        return []
    messages, _ = messages_of(row)
    notes = [
        f"the chat template prints {missing[:60]!r}, which nothing defines, so nothing stands there; correct the name "
        "in a copy of it and set model.chat_template to it"
        for missing in undefined_names(tokenizer, messages)
    ]
    if left_out := _unwritten_names(dataset, tokenizer):
        notes.append(
            f"the chat template writes nothing of what messages have under {', '.join(map(repr, left_out))}; where the "
            "model is to learn or read it, put it into the content, or set model.chat_template to a Jinja file"
        )
    if assistant_only and (header := AssistantSpans(tokenizer).learned_header()):
        notes.append(
            f"the chat template has no generation prompt, so the assistant learns to write {header[:60]!r} itself; "
            "write it where add_generation_prompt is set, in a copy of the template, and set model.chat_template to it"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append(
            f"the chat template asks for today's date, which training rows have as {TRAINING_DATE:%d %b %Y}, so that "
            "they are the same tomorrow"
        )
    return notes


def _unwritten_names(dataset: "Dataset", tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of messages' texts, such as reasoning_content, of which the chat template writes nothing."""
    texts: dict[str, dict[str, Any]] = {}
    for column in (*CONVERSATIONS_COLUMNS, "chosen", "rejected"):
        if column not in dataset.column_names:
            continue
        names = set(dataset.features[column].feature)  # pyright: ignore[reportAttributeAccessIssue]
        names -= {"content", "tool_calls", *BESIDE_TEXTS}
        for message in (message for row in dataset[column] for message in row) if names - set(texts) else ():
            texts |= {name: message for name in names - set(texts) if (message[name] or "").strip()}
    return [name for name, message in sorted(texts.items()) if not _writes(tokenizer, message, name)]


def _writes(tokenizer: PreTrainedTokenizerBase, message: Mapping[str, Any], name: str) -> bool:
    """Tell whether the chat template writes what a message has under a name, where that is the last one."""
    mark, (turn,) = "Zq7f3axqZ", as_messages([message])
    before = [] if turn["role"] != "assistant" else [{"role": "user", "content": "a"}]
    try:
        return mark in render(tokenizer, [*before, {**turn, name: mark}])
    except UserError:  # no conversation that the template takes
        return True


def row_check(
    tokenizer: PreTrainedTokenizerBase | None, assistant_only: bool = True, training: Mapping[str, Any] | None = None
) -> Callable[[dict[str, Any]], None]:
    """Return what `build_dataset` asks of every row: that the chat template takes it, and that a prompt leaves room.

    Args:
        tokenizer: The run's; None where rows are no conversations.
        assistant_only: The assistant's tokens are to be told from the others, in conversations.
        training: The run's training arguments: of preferences, a prompt is to be shorter than its `max_length`.
    """
    # that there is no template is told once, for all rows
    spans = AssistantSpans(tokenizer) if tokenizer is not None and tokenizer.chat_template else None
    limit = None if (training or {}).get("truncation_mode") == "keep_end" else (training or {}).get("max_length")

    def check_preference(row: dict[str, Any]) -> None:
        prompt = row["prompt"]
        if isinstance(prompt, list):
            if spans is None:
                return
            kind, tools = str(kind_of(row)), listed_tools(row.get("tools"))
            try:
                prompt, whole = rendered(row, kind, tokenizer)
                for name in COMPLETIONS[kind]:
                    spans.check_written([*as_messages(row["prompt"]), *as_messages(row[name])], tools)
                texts = list(whole.values())
            except UserError as error:
                raise RowError(str(error)) from None
        else:
            end = getattr(tokenizer, "eos_token", None) or ""
            texts = [row[name].removesuffix(end) for name in COMPLETIONS[str(kind_of(row))]]
        if len(texts) > len(set(texts)):
            raise RowError(
                "'chosen' and 'rejected' are the same once the chat template, or the end token, is there: nothing is "
                "preferred; remove the row"
            )
        # a token has a byte or more
        if tokenizer is None or limit is None or len(prompt.encode()) < limit:
            return
        tokens = len(tokenizer(prompt, add_special_tokens=isinstance(row["prompt"], str))["input_ids"])
        if tokens >= limit:
            raise RowError(
                f"the prompt has {tokens:,} tokens, and training.max_length is {limit:,}, which leaves nothing of a "
                "completion; raise it, or shorten the prompt"
            )

    def check(row: dict[str, Any]) -> None:
        if kind_of(row) is not None:
            check_preference(row)
            return
        if spans is None or not isinstance(row["messages"] if "messages" in row else row.get("prompt"), list):
            return
        messages, learned_from = messages_of(row)
        tools = listed_tools(row.get("tools"))
        if not assistant_only and any(map(has_no_weight, messages)):
            raise RowError(
                "a turn has weight 0, but training.assistant_only_loss: false learns every turn; leave one of them out"
            )
        try:
            if learned_from:
                render(tokenizer, messages[:learned_from], tools, add_generation_prompt=True)
            if assistant_only and getattr(tokenizer, "is_fast", False):
                spans.find(messages, tools, learned_from)
            else:
                render(tokenizer, messages, tools)
            spans.check_written(messages, tools)
        except UserError as error:
            raise RowError(str(error)) from None

    return check
