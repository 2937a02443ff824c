"""Questions answered by a model itself, greedily and many at a time, which answers are right, and where they end."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lsr_scale import Decoder
from lsr_scale.data.answered_prompts import prompt_ids
from lsr_scale.errors import UserError
from lsr_scale.model import load_config, load_tokenizer, resolve
from lsr_scale.model.tokenizer import end_tokens, render_chat
from lsr_scale.rewards.shipped import exact_answer


def check_ends(folder: str) -> None:
    """Refuse a model whose generation does not end where its chat template ends an answer: each would be the longest.

    Args:
        folder: A Transformers folder, or a model's name.

    Raises:
        UserError: with the tokens at which it ends.
    """
    tokenizer: Any = load_tokenizer(folder)
    try:
        others = GenerationConfig.from_pretrained(resolve(folder)).eos_token_id
    except OSError:  # without a file of its own it is as the model's configuration says
        others = getattr(load_config(folder), "eos_token_id", None)
    ends: Any = end_tokens(tokenizer, others)
    talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}]
    behind = render_chat(tokenizer, talk).rpartition("Yes")[2]
    if not {*ends} & {*tokenizer(behind, add_special_tokens=False)["input_ids"]}:
        raise UserError(
            f"--model {folder}: generation ends at {tokenizer.convert_ids_to_tokens(ends)}, but its chat template ends "
            f"an answer by {behind!r}; put its end into eos_token of tokenizer_config.json, or eos_token_id of "
            "generation_config.json"
        )


def generated(model: Any, tokenizer: Any, prompts: Sequence[Any], batch: int, max_new_tokens: int) -> list[str]:
    """Return a model's greedy completion of each prompt.

    Args:
        model: A causal language model, an adapter in it or not.
        tokenizer: Its tokenizer, which has a token to pad with.
        prompts: Texts, or messages up to where the assistant answers.
        batch: Prompts at a time; all are padded to the longest, so that batches share their CUDA graph.
        max_new_tokens: When to stop at the latest; a batch ends with its last answer.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest, pad = max(map(len, rows)), tokenizer.pad_token_id
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    decoder, texts = Decoder(model), []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part], device=model.device)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad}
        tokens = decoder.generate(ids, mask, **options)[:, longest:]
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def right_answers(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch: int, max_new_tokens: int
) -> list[bool]:
    """Return which rows' questions a model answers rightly, as the reward `exact_answer` judges.

    Args:
        model: As in `generated`, and so the others.
        tokenizer: Its tokenizer.
        rows: With `prompt` and `answer`.
        batch: Prompts at a time.
        max_new_tokens: When to stop at the latest.
    """
    texts = generated(model, tokenizer, [row["prompt"] for row in rows], batch, max_new_tokens)
    return [bool(exact_answer(text, row["answer"])) for text, row in zip(texts, rows, strict=True)]
