"""Trying a model out: its greedy continuation of a prompt."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from lsr_scale.data.model_limits import check_token_id, num_positions, stated_length
from lsr_scale.data.readers import check_characters
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import end_tokens, render_chat

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = False,
    say: Callable[[str], None] = logger.warning,
) -> str:
    """Return the model's greedy continuation of a prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text; put into the chat template as a user's turn with `chat`.
        max_new_tokens: When to stop at the latest.
        chat: Use the chat template.
        say: Told where the model has no positions for all of `max_new_tokens`.

    Raises:
        UserError: if there is no chat template, it fails, nothing is to be continued, the prompt holds half of a
            character or leaves the model no position for a new token, or the model's logits are not finite.
    """
    check_characters(prompt, "--prompt")
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: the model's tokenizer has no chat template; leave it out, or set model.chat_template")
    if chat:
        prompt = render_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("--prompt: expected some text to continue, got none")
    rows = model.get_input_embeddings().num_embeddings
    check_token_id(int(inputs["input_ids"].max()), rows, tokenizer, model.config, "--prompt")
    length, positions, made_for = inputs["input_ids"].shape[1], num_positions(model), stated_length(model.config)
    if positions is not None and length >= positions:
        raise UserError(f"--prompt: has {length:,} tokens, but the model has {positions:,} positions; shorten it")
    end = made_for if positions is None else positions
    # a prompt longer than the model is made for, which RoPE allows, is continued as asked
    left = max_new_tokens if end is None or length >= end else min(max_new_tokens, end - length)
    out = model.generate(
        **inputs,
        max_new_tokens=left,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[_check_finite],
        eos_token_id=end_tokens(tokenizer, model.generation_config.eos_token_id) or None,
    )
    if left < max_new_tokens and out.shape[1] == end:
        say(f"stopped after {left:,} of {max_new_tokens:,} new tokens: the model is made for {end:,} in all")
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)


def _check_finite(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Raise for logits of NaN, whose argmax would be token 0 for ever; a logits processor of `generate`."""
    if not (logits < torch.inf).all():  # NaN is not either; -inf is how models rule tokens out
        raise UserError(
            f"the model's logits are not finite after {ids.shape[1]} tokens: the adapter diverged, or the base "
            "overflows in model.dtype; --base-only tells which"
        )
    return logits
