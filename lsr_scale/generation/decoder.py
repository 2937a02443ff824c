"""`Decoder`: prompts in, tokens out, with decoding steps that a GPU does without waiting for its host.

    decoder = lsr_scale.Decoder(model)  # a base, an adapter, or a model with an AdapterBank
    decoder.generate(**inputs, max_new_tokens=64, adapter_names=["alice", "bob", "__base__"])

The prompts are one ordinary forward pass. After that each step is the same kernels on the same memory (`step.py`), on a
GPU one CUDA graph, kept for the next batch of as many rows and about as many tokens. Which adapter a row has is not in
the graph: the pairs of a batch are written where those of the batch before were.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from lsr_scale.adapters.peft import AdapterLinear
from lsr_scale.adapters.peft.per_sample import PairMemory, adapters_per_sample, batch_lock
from lsr_scale.errors import UserError, first_line
from lsr_scale.fused.cuda_graphs import rounded
from lsr_scale.generation.active_pairs import PairedLora, active_pairs
from lsr_scale.generation.fallback import arguments_of, decoder_fallback_reason, tuner_of
from lsr_scale.generation.sampling import Sampling
from lsr_scale.generation.step import DecodeStep

logger = logging.getLogger(__name__)

# steps between two looks at a GPU's rows, whether all have ended: each waits for the GPU
STEPS_BETWEEN_LOOKS = 16
# of rows that memory is kept for: so many tokens at least, and so many lengths until they are twice as long
LEAST_LENGTH, LENGTHS_PER_DOUBLING = 64, 8


class NotFiniteError(UserError):
    """A model's logits are not finite.

    Attributes:
        tokens: After how many tokens, prompt and answer, of the first such row.
    """

    tokens = 0


class Decoder:
    """Generates with a causal language model: a base, an adapter's, or one whose rows have different adapters."""

    def __init__(
        self,
        model: Any,
        max_steps: int = 2,
        graphs: bool | None = None,
        longest: int | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        """Take a model, which stays as it is.

        Args:
            model: A causal language model of transformers, or a PEFT model of one.
            max_steps: For how many kinds of batches the key/value cache, graph and pairs are kept: rows, length, and
                whether rows have adapters of their own.
            graphs: Whether steps are CUDA graphs, by default on a GPU, until a capture fails.
            longest: Rows that may get longer are transformers' own generation's, whose cache grows with them; by
                default none are.
            say: Told, once each, why steps are not what they could be.
        """
        self.model, self.max_steps, self.graphs = model, max_steps, graphs
        self.longest, self.say = longest, say
        self.steps: OrderedDict[tuple[int, int, bool], DecodeStep] = OrderedDict()
        # of pairs, by the number of rows, and whether these have adapters of their own
        self.memories: dict[tuple[int, bool], PairMemory] = {}
        self._said: set[str] = set()
        self._stream: Any = None  # that graphs are warmed up on

    @torch.inference_mode(False)  # what is kept must be writable outside of it
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        adapter_names: Sequence[str] | None = None,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        answers: Sequence[int] | None = None,
        log_probs: list[Tensor] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Tensor:
        """Return prompts and answers, `[B, S + new]`, as transformers' `generate` would.

        Args:
            input_ids: Prompts `[B, S]`, padded at the left.
            attention_mask: `[B, S]`, 0 where a row is padded; by default nowhere.
            adapter_names: An adapter a row, of the model's or its bank's; "__base__" for none. By default all rows use
                the active adapters.
            max_new_tokens: When to stop at the latest.
            temperature: 0 takes the most likely token; above, tokens are drawn. By default drawn only where `top_p`,
                `top_k` or `seed` is given.
            top_p: Draw from the most likely tokens that together have this probability.
            top_k: Draw from so many of the most likely tokens.
            min_p: Draw from tokens at least so likely as this times the most likely one.
            repetition_penalty: Above 1, what was there already is less likely.
            seed: Of the draws; by default they go on from the process's random state.
            eos_token_id: What ends a row; the model's by default, `[]` for nothing.
            pad_token_id: What follows the end; the model's by default.
            answers: How many answers each prompt gets, by default one; they are the rows of what is returned, in the
                prompts' order. A prompt is computed once for all of its own.
            log_probs: A list that is given the log-probability of each step's tokens, `[B]`, by the model's logits as
                they are, before temperature and cuts. Steps by transformers' own generation give none.
            streamer: Given the prompt, and each token as it comes; of one row.

        Raises:
            UserError: for values or adapters that do not fit, or padding at the right; a NotFiniteError for logits.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, min_p)
        mask = _checked_mask(input_ids, attention_mask)
        source = _sources(input_ids, answers)
        if adapter_names is not None and source is not None:
            raise UserError("adapter_names: are of rows with an answer each; leave answers out, or repeat the prompts")
        if streamer is not None and (len(input_ids) if source is None else len(source)) > 1:
            raise UserError("streamer: takes one row; leave it out, or give one prompt")
        ends, pad = self._special_tokens(eos_token_id, pad_token_id)
        reason = self._fallback_reason(input_ids.shape[1] + max_new_tokens, adapter_names)
        training = self.model.training
        if training:
            self.model.eval()
        # without a seed the draws come from, and move on, the process's own state
        devices = [input_ids.device] if input_ids.is_cuda else []
        # kernels are launched, and graphs captured, on the current GPU
        on_gpu = torch.cuda.device(input_ids.device) if input_ids.is_cuda else nullcontext()
        try:
            with on_gpu, torch.random.fork_rng(devices) if seed is not None else nullcontext():
                if seed is not None:
                    torch.manual_seed(seed)
                if reason is not None:
                    self._say(f"generation is transformers' own, without CUDA graphs: {reason}")
                    names = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
                    options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or None, "pad_token_id": pad}
                    options |= sampling.arguments() | names
                    options |= {"streamer": streamer, "logits_processor": [_check_finite]}
                    rows = slice(None) if source is None else source
                    return self.model.generate(
                        input_ids=input_ids[rows], attention_mask=mask[rows], use_cache=True, **options
                    )
                return self._generate(input_ids, mask, sampling, adapter_names, ends, pad, source, log_probs, streamer)
        finally:
            if training:
                self.model.train()

    def clear(self) -> None:
        """Free the memory: key/value caches, graphs and pairs."""
        self.steps.clear()
        self.memories.clear()

    def _generate(
        self,
        input_ids: Tensor,
        mask: Tensor,
        sampling: Sampling,
        adapter_names: Sequence[str] | None,
        ends: list[int],
        pad: int,
        source: Tensor | None,
        log_probs: list[Tensor] | None,
        streamer: BaseStreamer | None,
    ) -> Tensor:
        rows, prompt = input_ids.shape if source is None else (len(source), input_ids.shape[1])
        new = sampling.max_new_tokens
        ids = input_ids.new_full((rows, prompt + new), pad)
        ids[:, :prompt] = input_ids if source is None else input_ids[source]
        end_ids = torch.tensor(ends, device=ids.device)
        running = torch.ones(rows, dtype=torch.bool, device=ids.device)
        finite, lengths = running.clone(), torch.zeros(rows, dtype=torch.int64, device=ids.device)
        between_looks = STEPS_BETWEEN_LOOKS if ids.is_cuda and streamer is None else 1
        may_end = bool(ends) or streamer is not None
        if streamer is not None:
            streamer.put(input_ids.cpu())
        with self._adapters(input_ids, adapter_names, rows) as pairs:
            step, logits = self._prefill(input_ids, mask, new, pairs, adapter_names is not None, source)
            for done in range(new):
                scores = logits.to(torch.float32, copy=True)
                finite &= scores.amax(-1) < torch.inf  # NaN is not either; -inf is how models rule tokens out
                running &= finite
                likely = None if log_probs is None else scores.log_softmax(-1)
                tokens = sampling.next_tokens(ids[:, : prompt + done], scores)
                if log_probs is not None and likely is not None:
                    log_probs.append(likely.gather(1, tokens[:, None])[:, 0])
                tokens = tokens.where(running, pad)
                ids[:, prompt + done] = tokens
                lengths += running
                if streamer is not None and finite.all():
                    streamer.put(tokens.cpu())
                running &= (tokens[:, None] != end_ids).all(-1)
                look = may_end and (done + 1) % between_looks == 0
                if done + 1 == new or (look and not running.any()):
                    break
                step.tokens.copy_(tokens[:, None])
                logits = step.run()
        if not finite.all():
            raise _not_finite(finite, prompt + lengths, adapter_names)
        if streamer is not None:
            streamer.end()
        return ids[:, : prompt + int(lengths.max())]

    def _prefill(
        self, input_ids: Tensor, mask: Tensor, new: int, pairs: Any, named: bool, source: Tensor | None
    ) -> tuple[DecodeStep, Tensor]:
        """Return the step that comes after the prompts, and the logits that they end with."""
        options = {"logits_to_keep": 1} if "logits_to_keep" in arguments_of(self.model) else {}
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()  # without windows: the rows are no longer than one
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        length = max(LEAST_LENGTH, rounded(input_ids.shape[1] + new, LENGTHS_PER_DOUBLING))
        rows = len(input_ids) if source is None else len(source)
        key = rows, length, named
        if key not in self.steps:
            while len(self.steps) >= self.max_steps:
                self.steps.popitem(last=False)
            # the pairs of this batch are in use, whatever was kept before
            used = {(kind[0], kind[2]) for kind in (key, *self.steps)}
            self.memories = {kind: kept for kind, kept in self.memories.items() if kind in used}
            self.steps[key] = DecodeStep(self.model, cache, length, rows)
        self.steps.move_to_end(key)
        step = self.steps[key]
        if new > 1 and (input_ids.is_cuda if self.graphs is None else self.graphs):
            reason = None
            try:
                self._stream = self._stream or torch.cuda.Stream()
                pairs.renew()
                step.capture(lambda: [*_state(self.model), *pairs.addresses()], self._stream)
            except RuntimeError as error:
                reason = first_line(error)
            if reason is not None:  # not within the handler: until its end the error holds what the capture allocated
                self.graphs = False
                step.release()
                self._say(f"decoding steps are launched one kernel at a time: {reason}")
        step.start(cache, mask, source)
        logits = outputs.logits[:, -1]
        return step, logits if source is None else logits[source]

    @contextmanager
    def _adapters(self, input_ids: Tensor, adapter_names: Sequence[str] | None, rows: int) -> Iterator[Any]:
        """Have the rows use their adapters, by pairs that a graph can read."""
        memory = self.memories.setdefault((rows, adapter_names is not None), {})
        tuner = tuner_of(self.model)
        with batch_lock(self.model if tuner is None else tuner):
            if adapter_names is None or tuner is None:
                with active_pairs(self.model, memory) as pairs:
                    yield pairs
                return
            # once each, whatever the model's own defaults for generation say
            call = {"adapter_names": adapter_names, "input_ids": input_ids, "num_beams": 1, "num_return_sequences": 1}
            with adapters_per_sample(tuner, tuner.method, tuner.bank, (), call, memory) as pairs:
                yield pairs

    def _special_tokens(
        self, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
    ) -> tuple[list[int], int]:
        """Return the tokens that end a row, and the one that follows."""
        defaults = getattr(self.model, "generation_config", None)
        ends: Any = getattr(defaults, "eos_token_id", None) if eos_token_id is None else eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = getattr(defaults, "pad_token_id", None) if pad_token_id is None else pad_token_id
        return ends, next((token for token in (pad, *ends) if token is not None), 0)

    def _fallback_reason(self, length: int, adapter_names: Sequence[str] | None) -> str | None:
        if self.longest is not None and length > self.longest:
            return f"rows of up to {length:,} tokens are more than the {self.longest:,} that memory is kept for"
        return decoder_fallback_reason(self.model, length, adapter_names)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def _sources(input_ids: Any, answers: Sequence[int] | None) -> Tensor | None:
    """Return for each row of what is returned the number of its prompt, None where each prompt has one answer.

    Raises:
        UserError: if there is not a positive number for each prompt.
    """
    if answers is None or (all(number == 1 for number in answers) and len(answers) == len(input_ids)):
        return None
    if len(answers) != len(input_ids) or not all(isinstance(number, int) and number > 0 for number in answers):
        raise UserError(
            f"answers: expected a number from 1 on for each of {len(input_ids)} prompts, got {answers!r:.80}"
        )
    numbers = torch.tensor(answers, device=input_ids.device)
    return torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(numbers)


def _checked_mask(input_ids: Any, attention_mask: Any) -> Tensor:
    """Return the mask of prompts, int64; raise UserError for what is none."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise UserError(f"input_ids: expected prompts [rows, tokens], got {shape}")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise UserError(f"attention_mask is {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}")
    mask = attention_mask.to(input_ids)
    if not bool((mask[:, -1] == 1).all() & (mask.diff(dim=1) >= 0).all()):
        raise UserError(
            "attention_mask: prompts of different lengths must be padded at the left; set the tokenizer's "
            "padding_side='left'"
        )
    return mask


def _state(model: nn.Module) -> list[Any]:
    """Return what a captured step depends on, beside shapes and pairs: weights, which adapters act, and autocast."""
    state: list[Any] = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    device = next(model.parameters()).device.type
    state.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            state.append((layer.disable_adapters, tuple(layer.merged_adapters), tuple(layer.active_adapters)))
            if not isinstance(layer, AdapterLinear):
                if not isinstance(layer, PairedLora):  # its scaling is in its pair
                    state.append(str(getattr(layer, "scaling", None)))
            elif not layer.method.is_low_rank():
                state.append([(name, config.scaling) for name, config in layer.adapter_configs.items()])
    return state


def _check_finite(ids: Any, logits: Any) -> Any:
    """Raise for logits of NaN, whose argmax would be token 0 for ever; a logits processor of `generate`."""
    finite = (logits < torch.inf).all(-1)
    if not finite.all():
        raise _not_finite(finite, torch.full_like(finite, ids.shape[1], dtype=torch.int64), None)
    return logits


def _not_finite(finite: Tensor, lengths: Tensor, adapter_names: Sequence[str] | None) -> NotFiniteError:
    """Return the error of rows whose logits are not finite, after so many tokens each."""
    bad = finite.logical_not().nonzero().flatten().tolist()
    named = [f"{row} ({adapter_names[row]})" if adapter_names is not None else str(row) for row in bad[:8]]
    error = NotFiniteError(
        f"the model's logits are not finite in row {', '.join(named)}: the adapter diverged, or the base overflows in "
        "its dtype; leave these rows out"
    )
    error.tokens = int(lengths[bad[0]])
    return error
