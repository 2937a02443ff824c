"""The prompts of a run, `eval.prompts`: read, checked, and made into tokens as the training rows are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsr_scale.data.conversations import with_lists
from lsr_scale.data.formats import Kind
from lsr_scale.data.readers import check_characters, check_regular, read_file, suffix
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import render_chat
from lsr_scale.paths import user_path

Prompt = str | list[dict[str, str]]
MAX_PROMPTS = 100  # more are generated from for minutes, at every evaluation
_WHERE = "eval.prompts"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the user wrote it, and the tokens that the model continues."""

    prompt: Prompt
    ids: list[int]


def load_prompts(given: str | Sequence[Any]) -> list[Prompt]:
    """Return the prompts of a run.

    Args:
        given: The prompts, or the path of a file that holds them: .txt, one a line, or .jsonl, one row each with
            `prompt`, a text or a list of messages, or `messages`.

    Raises:
        UserError: if the file cannot be read or holds something else, or there are more than `MAX_PROMPTS`.
    """
    prompts = _read(given) if isinstance(given, str) else [_plain(prompt) for prompt in given]
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{_WHERE}: {len(prompts):,} prompts, {MAX_PROMPTS} are the most, as all are answered at every evaluation; "
            "take some of them, and measure on the rest with eval.tasks or data.validation"
        )
    for prompt in prompts:
        for text in [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]:
            check_characters(text, _WHERE)
    return prompts


def _plain(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    return [turn if isinstance(turn, dict) else {"role": turn.role, "content": turn.content} for turn in prompt]


def _read(path: str) -> list[Prompt]:
    file = user_path(path, _WHERE)
    if not file.is_file():
        raise UserError(
            f"{_WHERE}: {path!r:.200} is text, which is the path of a file with prompts, and there is none; write a "
            "list of prompts, one '- prompt' a line, or the path of a .txt or .jsonl file"
        )
    check_regular(file)
    if file.suffix == ".txt":
        try:
            # lines as editors show them: prompts may hold what str.splitlines takes for an end, such as U+2028
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from error
        found: list[Prompt] = [line for line in lines if line.strip()]
    elif suffix(file) in (".jsonl", ".json"):
        found = [prompt_of_row(row, f"{file}, line {number}") for number, row in read_file(file, None)]
    else:
        raise UserError(f"{_WHERE}: {path!r:.200}: expected a .txt file, a prompt a line, or a .jsonl file")
    if not found:
        raise UserError(f"{file}: no prompts in it; write one a line, or leave {_WHERE} out")
    return found


def prompt_of_row(row: dict[str, Any], where: str) -> Prompt:
    """Return the `prompt` or the `messages` of a row.

    Raises:
        UserError: which begins with `where`, if it has neither, or messages that cannot be read.
    """
    try:
        row = dict(with_lists(row, "prompt" if "prompt" in row else "messages"))
    except RowError as error:
        raise UserError(f"{where}: {error}") from None
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        if len(turns) == len(prompt) and all(
            isinstance(turn.get(k), str) for turn in turns for k in ("role", "content")
        ):
            return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    raise UserError(
        f"{where}: expected a text, or a list of {{'role': ..., 'content': ...}}, under 'prompt' or 'messages', got "
        f"{prompt!r:.80}"
    )


def encode_prompts(prompts: Sequence[Prompt], kind: Kind, tokenizer: Any) -> list[EncodedPrompt]:
    """Return prompts with their tokens, up to where the model continues.

    Messages go through the chat template. So does a text where the run trains on conversations: as a user's turn.

    Args:
        prompts: From `load_prompts`.
        kind: What the training rows are.
        tokenizer: The run's.

    Raises:
        UserError: for messages that the chat template does not take, or where there is none.
    """
    return [EncodedPrompt(prompt, _ids(prompt, kind, tokenizer, number)) for number, prompt in enumerate(prompts, 1)]


def _ids(prompt: Prompt, kind: Kind, tokenizer: Any, number: int) -> list[int]:
    if isinstance(prompt, str) and kind not in (
        "messages",
        "chat_prompt_completion",
        "chat_preference",
        "chat_unpaired",
        "chat_prompts",
    ):
        return tokenizer(prompt)["input_ids"] or [_first_token(tokenizer, number)]
    if not tokenizer.chat_template:
        raise UserError(
            f"{_WHERE}: prompt {number} is messages, but the model's tokenizer has no chat template; write it as text, "
            "or set model.chat_template to a Jinja file"
        )
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = render_chat(tokenizer, turns, add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{_WHERE}: prompt {number}: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _first_token(tokenizer: Any, number: int) -> int:
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    raise UserError(f"{_WHERE}: prompt {number} is empty, so there is nothing to continue; write some text")
