"""Multiple-choice scoring: how often the right choice is the one with the highest log-likelihood.

Equal to lm-eval's `HFLM` example by example, and small: inputs are sorted by length and batched by tokens, only the
positions of the continuations are projected onto the vocabulary, and choices that differ in their last token alone
(yes / no) share one forward pass. Where many models are asked the same, `encode_examples` makes token ids and batches
once, and `score_encoded` scores each model on them.
"""

import dataclasses
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
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


class NonFiniteScoresError(UserError):
    """A model's log-likelihoods are not finite."""


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


def _logits_at(model: nn.Module, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Run the model and return the logits [N, vocabulary] of the positions (rows[n], columns[n]) only.

    The model's own forward runs, with whatever it does to its logits (soft caps, scales); a hook narrows the input of
    its output embedding to those positions. There is no attention mask, as in lm-eval: what pads a row comes after its
    tokens, which do not attend to it, and without a mask attention is faster.
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
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    assert narrowed, "the model's forward does not call its output embedding"
    return logits[0]


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """A batch on a device.

    Attributes:
        ids: `[inputs, longest]`, padded on the right.
        rows: `[N]`, of each target token, the input that it follows.
        columns: `[N]`, of each target token, the position before it.
        targets: `[N, 1]`, the target tokens.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Inputs of one forward pass, the longest first.

    Attributes:
        inputs: Their token ids.
        targets: By input and request, the target ids, which are the end of the input, shifted by one.
    """

    inputs: list[tuple[int, ...]]
    targets: list[dict[int, list[int]]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.inputs))

    def to(self, device: torch.device) -> _Tensors:
        """Return its tensors."""
        longest = len(self.inputs[0])
        spans = [(row, target) for row, of_input in enumerate(self.targets) for target in of_input.values()]
        lengths = [len(inputs) for inputs in self.inputs]
        columns = [c for row, target in spans for c in range(lengths[row] - len(target), lengths[row])]
        return _Tensors(
            ids=torch.tensor([inputs + (0,) * (longest - len(inputs)) for inputs in self.inputs], device=device),
            rows=torch.tensor([row for row, target in spans for _ in target], device=device),
            columns=torch.tensor(columns, device=device),
            targets=torch.tensor([token for _, target in spans for token in target], device=device)[:, None],
        )


@dataclasses.dataclass
class EncodedExamples:
    """Examples as models with the same tokenizer are asked them; made by `encode_examples`.

    Attributes:
        examples: What they were made of.
        batches: Of their inputs.
        largest_id: The largest token id of an input or a target.
    """

    examples: Sequence[Example]
    batches: list[_Batch]
    largest_id: int
    _kept: dict[torch.device, list[_Tensors]] = dataclasses.field(default_factory=dict, repr=False)

    def keep_on(self, device: torch.device | str) -> None:
        """Copy all batches to a device once, where models on it would have each copied anew."""
        tensors = [batch.to(torch.device(device)) for batch in self.batches]
        self._kept[tensors[0].ids.device] = tensors  # with its number: "cuda" is one of several

    def tensors(self, index: int, device: torch.device) -> _Tensors:
        """Return a batch on a device."""
        return self._kept[device][index] if device in self._kept else self.batches[index].to(device)


def _log_likelihoods(model: nn.Module, batch: _Tensors) -> Tensor:
    """Return the log-likelihood of each target token of a batch, on the model's device."""
    logits = _logits_at(model, batch.ids, batch.rows, batch.columns)
    parts = zip(logits.split(256), batch.targets.to(logits.device).split(256), strict=True)
    return torch.cat([part.float().log_softmax(-1).gather(1, pick)[:, 0] for part, pick in parts])  # float32 in parts


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
        raise NonFiniteScoresError(
            f"scoring: the log-likelihoods of example {example.id} are not finite {log_likelihoods}; the training "
            "diverged (lower the learning rate) or the dtype overflowed (use bfloat16 or float32)"
        )
    per_character = [value / size for value, size in zip(log_likelihoods, example.normalizers, strict=True)]
    best, best_norm = log_likelihoods.index(max(log_likelihoods)), per_character.index(max(per_character))
    return Prediction(example.id, example.answer, log_likelihoods, best, best_norm)


def input_limit(model: nn.Module) -> int | None:
    """Return the longest input in tokens that a model's configuration allows, None where it says none."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    unconditional: bool = False,
) -> EncodedExamples:
    """Encode examples and batch them, for any number of models with this tokenizer: see `score_encoded`.

    Args:
        tokenizer: The models' tokenizer.
        examples: What is to be scored.
        batch_tokens: As of `score`.
        max_length: Longest input in tokens, longer ones are truncated on the left; None: none are. `input_limit` tells
            a model's own.
        unconditional: As of `score`.

    Raises:
        UserError: Nothing to score, a continuation longer than `max_length`, or `unconditional` where all choices share
            one continuation (WinoGrande).
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
    limit = max_length or 2**31
    groups: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(dict)  # inputs -> {request: target ids}
    for request, (context_ids, target_ids) in enumerate(encode_pairs(tokenizer, pairs)):
        if not 1 <= len(target_ids) <= limit:
            what = f"got {len(target_ids)} for {pairs[request][1][:60]!r}"
            raise UserError(f"scoring: expected a continuation of 1 to {limit} tokens (max_length), {what}")
        groups[tuple((context_ids + target_ids)[-limit - 1 : -1])][request] = target_ids
    batches = [_Batch(inputs, [groups[one] for one in inputs]) for inputs in _batches(groups, batch_tokens)]
    targets = (target for of_input in groups.values() for target in of_input.values())
    return EncodedExamples(examples, batches, max(max(ids, default=0) for ids in (*groups, *targets)))


class EncodesOnce:
    """Encodes as `encode_examples` does, once for the same examples, tokenizer and options: 2 s for 4,500 questions.

    Attributes:
        most: How many encodings are kept; beyond that the one that was not asked for the longest goes.
    """

    def __init__(self, most: int = 16) -> None:
        """Begin with none."""
        self.most = most
        # each with its tokenizer, whose id would be another's otherwise
        self._kept: OrderedDict[Any, tuple[PreTrainedTokenizerBase, EncodedExamples]] = OrderedDict()

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **options: Any
    ) -> EncodedExamples:
        """Return what `encode_examples` returns; see there."""
        key = id(tokenizer), tuple(examples), tuple(sorted(options.items()))
        if key not in self._kept:
            self._kept[key] = tokenizer, encode_examples(tokenizer, examples, **options)
            if len(self._kept) > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]


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
    encode: Callable[..., EncodedExamples] = encode_examples,
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
        encode: Encodes them: `encode_examples`, or an `EncodesOnce`.

    Raises:
        UserError: Nothing to score, a continuation longer than `max_length`, log-likelihoods that are not finite, or
            `unconditional` where all choices share one continuation (WinoGrande).
    """
    encoded = encode(
        tokenizer,
        examples,
        batch_tokens=batch_tokens,
        max_length=max_length or input_limit(model),
        unconditional=unconditional,
    )
    return score_encoded(model, tokenizer, encoded, device=device, progress=progress, distribute=distribute)


@torch.no_grad()  # not inference mode: a tensor that a module caches here must still serve training
def score_encoded(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedExamples,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    distribute: bool = False,
) -> TaskScore:
    """Score examples that `encode_examples` encoded; arguments, result and errors are those of `score`."""
    config: Any = model.config
    config, rows = config.get_text_config(), model.get_input_embeddings().num_embeddings  # pyright: ignore
    check_token_id(encoded.largest_id, rows, tokenizer, config, "scoring: a question")
    where = torch.device(device) if device is not None else next(model.parameters()).device
    total, done = sum(batch.num_tokens for batch in encoded.batches), 0
    rank, size = distributed.group_rank_and_size() if distribute else (0, 1)
    numbers = list(range(len(encoded.batches)))
    numbers += numbers[:1] * (-len(numbers) % size)  # repeated so that each process has equally many
    mine, values = numbers[rank::size], []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for number in mine:
            values.append(_log_likelihoods(model, encoded.tensors(number, where)))
            done += encoded.batches[number].num_tokens * size
            if progress is not None:
                progress(min(done, total), total)
    finally:
        for module, training in modes:
            module.training = training
    log_likelihoods = [math.nan] * sum(len(example.continuations) for example in encoded.examples)
    targets = [pair for number in mine for of_input in encoded.batches[number].targets for pair in of_input.items()]
    starts = np.cumsum([0, *(len(target) for _, target in targets[:-1])])
    sums = np.add.reduceat(torch.cat(values).cpu().double().numpy(), starts)  # copied once, as a copy waits for a GPU
    for (request, _), value in zip(targets, sums.tolist(), strict=True):
        log_likelihoods[request] = value
    if size > 1:
        by_process = zip(*distributed.gather([log_likelihoods]), strict=True)
        log_likelihoods = [
            next((value for value in of_all if not math.isnan(value)), math.nan) for of_all in by_process
        ]
    remaining = iter(log_likelihoods)
    return TaskScore.of([_prediction(e, tuple(next(remaining) for _ in e.continuations)) for e in encoded.examples])
