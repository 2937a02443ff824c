"""One decoding step with a key/value cache of fixed size: eager, or replayed as a CUDA graph.

A step of a small model takes the GPU a fraction of the time that the host takes to launch it. Nothing that changes from
step to step is a number here: tokens, positions, the place in the cache and the mask are tensors that the step itself
moves on, so that the same kernels on the same memory do the next one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lsr_scale.generation.attention import attention_of_step, takes_kernel
from lsr_scale.generation.fallback import base_of
from lsr_scale.generation.fused_step import step_fallback_reason, step_logits


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Have autocast convert weights at each use: copies that it keeps are gone at its end, when a graph reads them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class FixedLayer(CacheLayerMixin):
    """A layer's keys and values `[B, heads, length, size]`, written at a place that is a tensor."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's states, and return those of all places; a mask says which hold any."""
        del args, kwargs
        assert self.keys is not None
        assert self.values is not None
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            # under autocast transformers' rotation makes float32 of keys, which a step's own leaves as they are
            memory.index_copy_(2, self.place, states.to(memory.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the memory and its offset, 0."""
        del query_length
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        """Return how many tokens are there: a tensor, as in transformers' `StaticLayer`."""
        return self.place

    def get_max_length(self) -> int:
        """Return for how many tokens there is memory."""
        assert self.keys is not None
        return self.keys.shape[2]


class DecodeStep:
    """A decoding step of a number of rows of a model, with room for a number of tokens in each.

    Attributes:
        tokens: `[B, 1]`, the tokens that the next step takes.
        state: What a captured step holds for, beside the shapes.
    """

    def __init__(self, model: Any, prefilled: Any, length: int, rows: int) -> None:
        """Allocate.

        Args:
            model: A causal language model.
            prefilled: A cache of prompts, whose shapes and dtypes are copied.
            length: Tokens of a row, prompt and answer.
            rows: How many there are.
        """
        self.model = model
        first = prefilled.layers[0].keys
        device = first.device
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.first = torch.zeros(rows, dtype=torch.int64, device=device)  # where a row's tokens begin
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask = torch.zeros(rows, 1, 1, length, dtype=first.dtype, device=device)  # added to the scores
        layers = []
        for layer in prefilled.layers:
            # zeros here and in `start`: a masked value that is not finite would spoil the sum
            keys, values = (
                part.new_zeros(rows, part.shape[1], length, part.shape[3]) for part in (layer.keys, layer.values)
            )
            layers.append(FixedLayer(keys, values, self.place))
        self.layers: list[Any] = layers
        self._base = base_of(model)
        self._takes_kernel = takes_kernel(self._base, first)
        self.cache = Cache(layers=layers)
        self.state: Any = None
        self._graph: Any = None
        self._logits: Tensor | None = None

    def start(self, prefilled: Any, attention_mask: Tensor, source: Tensor | None = None) -> None:
        """Take over a prompt's keys and values.

        Args:
            prefilled: The cache after the prompts.
            attention_mask: `[P, S]`, 0 where a prompt is padded, which is at its left.
            source: `[B]`, the prompt of each row; by default each prompt is a row.
        """
        prompt = attention_mask.shape[1]
        if source is not None:
            attention_mask = attention_mask[source]
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            for part, taken in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                part[:, :, :prompt].copy_(taken if source is None else taken[source])
                part[:, :, prompt:].zero_()
        closed = torch.finfo(self.mask.dtype).min
        self.mask.fill_(closed)
        self.mask[:, 0, 0, :prompt].masked_fill_(attention_mask.bool(), 0.0)
        self.positions.copy_(attention_mask.sum(1, keepdim=True))
        self.first.copy_(prompt - self.positions[:, 0])
        self.place.fill_(prompt)

    def run(self) -> Tensor:
        """Take `tokens` and return the logits of the next ones, `[B, vocabulary]`, which the next run overwrites."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def capture(self, state: Callable[[], Any], stream: Any) -> None:
        """Make the step a CUDA graph, unless it is one that holds for the same `state`; before `start`.

        Args:
            state: Returns what it holds for, which a capture may add to: pairs that prompts did not ask for.
            stream: Of the model's GPU, for the warm-up and the capture; the same for all steps, as libraries keep
                memory for each stream.
        """
        if self._graph is not None and self.state == state():
            return
        self.release()
        self.place.fill_(0)
        self.first.fill_(0)
        with _uncached_autocast():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run()  # warm-up: kernels are compiled and libraries loaded, which must not happen during capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # the default stream of captures is the first capture's in the process, maybe on another GPU;
            # thread_local: other threads may make calls that a capture must not
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                logits = self._run()
        self._graph, self._logits, self.state = graph, logits, state()

    def release(self) -> None:
        """Drop the graph: steps are eager again."""
        self._graph = self._logits = self.state = None

    def _run(self) -> Tensor:
        if self._takes_kernel and step_fallback_reason(self.model) is None:
            logits = step_logits(self._base, self.tokens, self.positions, self.layers, self.first)
        else:
            logits = self._logits_by_transformers()
        self.positions.add_(1)
        self.place.add_(1)
        return logits

    def _logits_by_transformers(self) -> Tensor:
        self.mask.index_fill_(3, self.place, 0.0)
        by_kernel = attention_of_step(self.first, self.place) if self._takes_kernel else nullcontext()
        with by_kernel:
            outputs = self.model(
                input_ids=self.tokens,
                attention_mask=self.mask,  # four dimensions: transformers passes it on as it is
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        return outputs.logits[:, -1]
