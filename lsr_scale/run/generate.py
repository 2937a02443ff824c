"""One answer: a prompt's tokens, checked before a model is needed, and what a model says after them."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers.generation.streamers import TextStreamer

from lsr_scale.data.model_limits import check_token_id, num_positions, stated_length
from lsr_scale.data.prompts import Prompt
from lsr_scale.data.readers import check_characters
from lsr_scale.errors import UserError
from lsr_scale.generation.decoder import Decoder, NotFiniteError
from lsr_scale.generation.sampling import Sampling
from lsr_scale.model.tokenizer import end_tokens, render_chat
from lsr_scale.units import amount

logger = logging.getLogger(__name__)

# tokens, prompt and answer; for more a cache that grows, as few answers are as long as they may be
LONGEST_ROW = 8192


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Without special tokens.
        tokens: How many, the end token included.
        seconds: That they took.
        stopped: "end" by an end token, "length" by the limit on new tokens, "context" by the model's.
    """

    text: str
    tokens: int
    seconds: float
    stopped: Literal["end", "length", "context"]


class Streamer(TextStreamer):
    """Passes text on as it comes, whole words and whole characters only, and remembers its tokens.

    Attributes:
        ids: The tokens so far.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then a token at a time."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show text that stays as it is."""
        self.show(text)

    def text(self) -> str:
        """Return the text so far."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)  # pyright: ignore[reportReturnType]


def encode(tokenizer: Any, prompt: Prompt, where: str = "--prompt") -> list[int]:
    """Return a prompt's tokens.

    Args:
        tokenizer: The model's.
        prompt: Text, or a conversation, which the chat template renders up to the assistant's next turn.
        where: What gave it, for messages.

    Raises:
        UserError: if nothing is to be continued, the prompt holds half of a character, there is no chat template, or it
            fails.
    """
    for text in [prompt] if isinstance(prompt, str) else [turn.get("content") for turn in prompt]:
        if isinstance(text, str):
            check_characters(text, where)
    if not prompt or (isinstance(prompt, list) and not prompt[-1].get("content")):
        raise UserError(f"{where}: expected some text to continue, got none")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        check_has_template(tokenizer)
        text = render_chat(tokenizer, prompt, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{where}: expected some text to continue, got none")
    return ids


def check_has_template(tokenizer: Any) -> None:
    """Raise a UserError where a conversation cannot be rendered."""
    if not tokenizer.chat_template:
        raise UserError("--chat: the model's tokenizer has no chat template; leave it out, or set model.chat_template")


def context_length(config: Any, empty: Callable[[], Any], trained: int | None = None) -> int | None:
    """Return how many tokens a model takes: its table of positions, else what it states or was trained with.

    Args:
        config: The model's configuration.
        empty: Makes the model, perhaps without weights.
        trained: The longest rows of the run; None without one.
    """
    if (positions := num_positions(empty())) is not None:
        return positions
    stated = stated_length(config)
    return None if stated is None else max(stated, trained or 0)


def check_fits(ids: list[int], tokenizer: Any, config: Any, context: int | None, where: str = "--prompt") -> None:
    """Refuse a prompt that the model has no embedding or no position for.

    Args:
        ids: Its tokens.
        tokenizer: Where they are from.
        config: The model's configuration.
        context: What `context_length` returned.
        where: What gave the prompt, for messages.

    Raises:
        UserError: naming the token, or the lengths.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        check_token_id(max(ids), rows, tokenizer, config, where)
    if context is not None and len(ids) >= context:
        raise UserError(
            f"{where}: has {amount(len(ids), 'token')}, but the model has {context:,} positions; shorten it"
        )


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    sampling: Sampling | None = None,
    *,
    context: int | None = None,
    streamer: TextStreamer | None = None,
    decoder: Decoder | None = None,
    say: Callable[[str], None] = logger.warning,
    where: str = "--prompt",
) -> Answer:
    """Return what a model says after a prompt, with its key-value cache; the model's mode stays as it was.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: Text to continue as it stands, or a conversation for the chat template.
        sampling: How tokens are chosen; by default the most likely ones.
        context: How many tokens the model takes; by default its positions, else what its configuration states.
        streamer: Given each token as it comes.
        decoder: The model's, which keeps its memory for the next answer; by default made for this one.
        say: Told where the model has no positions for all of `max_new_tokens`, and why transformers' own generation
            answers where the decoder cannot.
        where: What gave the prompt, for messages.

    Raises:
        UserError: as `encode` and `check_fits` do, or if the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    ids = encode(tokenizer, prompt, where)
    context = context or context_length(model.config, lambda: model)
    check_fits(ids, tokenizer, model.config, context, where)
    left = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
    inputs = torch.tensor([ids], device=model.device)
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    decoder = decoder or Decoder(model, longest=LONGEST_ROW, say=say)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        elif sampling.temperature:
            torch.seed()
        try:
            out = decoder.generate(
                inputs,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                **asdict(sampling) | {"max_new_tokens": left, "seed": None},
            )
        except NotFiniteError as error:
            raise UserError(
                f"the model's logits are not finite after {amount(error.tokens, 'token')}: the adapter diverged, or "
                "the base overflows in model.dtype; --base-only tells which"
            ) from None
    new = out[0, len(ids) :].tolist()
    seconds = time.perf_counter() - began
    stopped = "end" if new and new[-1] in ends else "length" if left == sampling.max_new_tokens else "context"
    if stopped == "context":
        say(
            f"stopped after {left:,} of {sampling.max_new_tokens:,} new tokens: the model is made for {context:,} in "
            "all"
        )
    return Answer(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds, stopped)
