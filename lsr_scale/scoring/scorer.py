"""Multiple-choice scoring: how often the right choice is the one with the highest log-likelihood.

Equal to lm-eval's `HFLM` example by example, and small: inputs are sorted by length and batched by tokens, only the
positions of the continuations are projected onto the vocabulary, and choices that differ in their last token alone
(yes / no) share one forward pass.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lsr_scale import distributed
from lsr_scale.data.model_limits import check_token_id
from lsr_scale.data.prompt_forms import scored_pair
from lsr_scale.data.tasks import Example
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import appended_ids
from lsr_scale.scoring.accuracy import Prediction, TaskScore


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Encode (context, continuation) texts to token ids, as lm-eval does for causal models.

    Context and continuation are encoded together and split after as many tokens as the context has alone, with the
    special tokens that the tokenizer prepends by itself (LLaMA's and Mistral's prepend one, SmolLM2's does not); those
    that it appends are dropped, or they would be scored. An empty context becomes the beginning-of-sequence token, or
    the end-of-sequence token if there is none.
    """
    prefix_id: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix_id is None:
        raise UserError(
            "scoring: the tokenizer has neither a beginning- nor an end-of-sequence token; set training.eos_token to "
            "one of its tokens"
        )
    prefix, num_appended = str(tokenizer.decode([prefix_id])), len(appended_ids(tokenizer))

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = [text[: len(text) - num_appended] for text in tokenizer(texts).input_ids]
        for index, text in enumerate(texts):
            if text.startswith(prefix):  # a text that spells out the special token gets no second one
                ids[index] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    moved = [scored_pair(context, continuation) for context, continuation in pairs]
    distinct = list(dict.fromkeys(context for context, _ in moved))
    context_ids = dict(zip(distinct, encode(distinct), strict=True))
    encoded = []
    for (context, continuation), joined in zip(moved, encode(["".join(pair) for pair in moved]), strict=True):
        if context:
            encoded.append((context_ids[context], joined[len(context_ids[context]) :]))
        else:
            ids = tokenizer.encode(continuation, add_special_tokens=False)
            encoded.append((ids[:1], ids[1:]) if ids[:1] == [prefix_id] else ([prefix_id], ids))
    return encoded


def _logits_at(model: nn.Module, ids: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Run the model and return the logits [N, vocabulary] of the positions (rows[n], columns[n]) only.

    The model's own forward runs, with whatever it does to its logits (soft caps, scales); a hook narrows the input of
    its output embedding to those positions.
    """
    narrowed = False

    def narrow(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal narrowed
        hidden = arguments[0]
        virtual = hidden.shape[1] - ids.shape[1]  # positions that a prompt-tuning adapter puts in front
        narrowed = True
        return hidden[rows.to(hidden.device), columns.to(hidden.device) + virtual].unsqueeze(0), *arguments[1:]

    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    assert narrowed, "the model's forward does not call its output embedding"
    return logits[0]


def _score_batch(
    model: nn.Module, batch: list[tuple[int, ...]], targets: list[list[list[int]]], device: Any
) -> list[float]:
    """Return a log-likelihood for each list of target ids, which are the end of their input, shifted by one."""
    longest = len(batch[0])
    ids = torch.tensor([inputs + (0,) * (longest - len(inputs)) for inputs in batch], device=device)
    mask = torch.tensor([[1] * len(inputs) + [0] * (longest - len(inputs)) for inputs in batch], device=device)
    spans = [(row, target) for row, several in enumerate(targets) for target in several]
    rows = torch.tensor([row for row, target in spans for _ in target])
    columns = torch.tensor([c for row, target in spans for c in range(len(batch[row]) - len(target), len(batch[row]))])
    logits = _logits_at(model, ids, mask, rows, columns)
    picks = torch.tensor([token for _, target in spans for token in target], device=logits.device)[:, None]
    parts = zip(logits.split(256), picks.split(256), strict=True)  # float32 a little at a time
    values = torch.cat([part.float().log_softmax(-1).gather(1, pick)[:, 0] for part, pick in parts])
    return [float(span.sum()) for span in values.cpu().split([len(target) for _, target in spans])]


def _batches(groups: Iterable[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Batch inputs of similar length, the longest first, so that memory runs out at once or never."""
    batches: list[list[tuple[int, ...]]] = []
    for inputs in sorted(groups, key=lambda ids: (-len(ids), ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(inputs)
    return batches


def _prediction(example: Example, log_likelihoods: tuple[float, ...]) -> Prediction:
    if not all(map(math.isfinite, log_likelihoods)):
        raise UserError(
            f"scoring: the log-likelihoods of example {example.id} are not finite {log_likelihoods}; the training "
            "diverged (lower the learning rate) or the dtype overflowed (use bfloat16 or float32)"
        )
    per_character = [value / size for value, size in zip(log_likelihoods, example.normalizers, strict=True)]
    best, best_norm = log_likelihoods.index(max(log_likelihoods)), per_character.index(max(per_character))
    return Prediction(example.id, example.answer, log_likelihoods, best, best_norm)


@torch.no_grad()  # not inference mode: a tensor that a module caches here must still serve training
def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    unconditional: bool = False,
    distribute: bool = False,
) -> TaskScore:
    """Score multiple-choice examples with a causal language model (plain, quantized or a PeftModel).

    Args:
        model: The model; put into evaluation mode, and back afterwards.
        tokenizer: Its tokenizer.
        examples: What to score (`lsr_scale.data.tasks.examples`).
        batch_tokens: Padded tokens in one forward pass.
        max_length: Longest input in tokens, longer ones are truncated on the left; None: the model's own limit.
        device: Device of the inputs; None: that of the model's first parameter.
        progress: Called as progress(tokens done, tokens in all) after each batch.
        unconditional: Score the choices without their contexts: a control for what they give away.
        distribute: Distribute the batches over the processes of this run, equally many each, since a sharded model must
            be run by all of them together; every process must call this, and gets all scores. Batches are the same for
            any number of processes.

    Raises:
        UserError: Nothing to score, a continuation longer than `max_length`, log-likelihoods that are not finite, or
            `unconditional` where all choices share one continuation (WinoGrande).
    """
    if not examples:
        raise UserError("scoring: expected at least one example, got none")
    if unconditional and any(len(set(example.continuations)) == 1 for example in examples):
        raise UserError("scoring without contexts: the choices of these examples share one continuation (WinoGrande)")
    pairs = [
        ("" if unconditional else context, continuation)
        for example in examples
        for context, continuation in zip(example.contexts, example.continuations, strict=True)
    ]
    config: Any = model.config
    config = config.get_text_config()
    limit: int = max_length or getattr(config, "max_position_embeddings", None) or 2**31
    groups: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(dict)  # inputs -> {request: target ids}
    for request, (context_ids, target_ids) in enumerate(encode_pairs(tokenizer, pairs)):
        if not 1 <= len(target_ids) <= limit:
            what = f"got {len(target_ids)} for {pairs[request][1][:60]!r}"
            raise UserError(f"scoring: expected a continuation of 1 to {limit} tokens (max_length), {what}")
        groups[tuple((context_ids + target_ids)[-limit - 1 : -1])][request] = target_ids

    largest = max((max(inputs, default=0) for inputs in groups), default=0)
    check_token_id(largest, model.get_input_embeddings().num_embeddings, tokenizer, config, "scoring: a question")  # pyright: ignore
    where = torch.device(device) if device is not None else next(model.parameters()).device
    log_likelihoods = [math.nan] * len(pairs)
    total, done = sum(map(len, groups)), 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        batches = _batches(groups, batch_tokens)
        rank, size = distributed.group_rank_and_size() if distribute else (0, 1)
        batches += batches[:1] * (-len(batches) % size)  # repeated so that each process has equally many
        for batch in batches[rank::size]:
            scores = _score_batch(model, batch, [list(groups[inputs].values()) for inputs in batch], where)
            for request, value in zip((r for inputs in batch for r in groups[inputs]), scores, strict=True):
                log_likelihoods[request] = value
            done += sum(map(len, batch)) * size
            if progress is not None:
                progress(min(done, total), total)
    finally:
        for module, training in modes:
            module.training = training
    if size > 1:
        by_process = zip(*distributed.gather([log_likelihoods]), strict=True)
        log_likelihoods = [
            next((value for value in of_all if not math.isnan(value)), math.nan) for of_all in by_process
        ]
    remaining = iter(log_likelihoods)
    return TaskScore.of([_prediction(e, tuple(next(remaining) for _ in e.continuations)) for e in examples])
