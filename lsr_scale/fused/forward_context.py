"""What the layers of one forward pass share: pairs of their adapters, boundaries of packed documents, the mask."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.adapters.joint import JointLinear
from lsr_scale.adapters.pairs import Adapter, AdapterBlocks, Pair, active_adapters, concatenate_pairs, materialize
from lsr_scale.adapters.peft import version_counters
from lsr_scale.errors import UserError
from lsr_scale.fused.document_mask import DocumentMask
from lsr_scale.fused.fallback import layer_fallback_reason
from lsr_scale.fused.layer_state import GradientBuffer, Positions, layer_linears
from lsr_scale.kernels.attention import Sequences, SharedPrefixes, dense_mask
from lsr_scale.kernels.backend import is_fake


@dataclass
class ForwardContext:
    """What the layers of one forward pass share; the decoder passes it to them as a keyword argument.

    Attributes:
        decoder: The model around the layers, such as `LlamaModel`.
        cu_seqlens: Boundaries of packed documents, or None.
        max_seqlen: Length of the longest.
        shared: Prefixes that they share; the boundaries are then those of their other tokens.
        mask_placeholder: Stands for the attention mask `[B, 1, S, S]` of packed documents, which is made only for a
            layer that runs unfused.
        causal_only: Every sequence is one document and the caller gave no mask: causality and a layer's own window
            are all there is.
    """

    decoder: Any
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    shared: SharedPrefixes | None = None
    mask_placeholder: Tensor | None = None
    causal_only: bool = False

    def __post_init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self.gradient_buffer = GradientBuffer()
        self._reasons: dict[int, str | None] = {}
        self._pairs: dict[int, Pair] = {}
        self._chunks = _chunks(list(self.decoder.layers))

    def reason(self, layer: nn.Module) -> str | None:
        """Return why a layer runs unfused in this forward pass, or None."""
        if id(layer) not in self._reasons:
            self._reasons[id(layer)] = layer_fallback_reason(layer)
        return self._reasons[id(layer)]

    def pairs(self, layer: nn.Module) -> list[Tensor | None]:
        """Return down and up of each linear of a layer, or None twice; materialized with its chunk's on first use."""
        chunk = self._chunks.get(id(layer), [])
        for other in chunk:
            self._chunks.pop(id(other), None)
        if chunk:
            # reentrant checkpointing runs the layer under no_grad, but the pairs need gradients
            with torch.set_grad_enabled(self._grad):
                self._pairs |= _pairs(self.decoder, [other for other in chunk if self.reason(other) is None])
        flat: list[Tensor | None] = []
        for linear in layer_linears(layer):
            flat += self._pairs.get(id(linear), (None, None))
        return flat


# Layers whose pairs are materialized at once: many, for few launches, but few where the GPU waits for them, which is
# before the first layer and, in the backward pass, after it.
_CHUNKS = (1, 3, 8, 20)


def _chunks(layers: list[nn.Module]) -> dict[int, list[nn.Module]]:
    """Return the chunk that each layer is in, by the layer's identity."""
    chunks: dict[int, list[nn.Module]] = {}
    start = 0
    for size in itertools.chain(_CHUNKS, itertools.repeat(_CHUNKS[-1])):
        if start >= len(layers):
            break
        chunk = layers[start : start + size]
        chunks |= {id(layer): chunk for layer in chunk}
        start += size
    return chunks


def _pairs(decoder: Any, layers: list[nn.Module]) -> dict[int, Pair]:
    """Return the pairs of the adapted linears of some layers; in evaluation cached until a factor changes.

    Those of linears that several trials adapt are stacked, `(down [n, r, in], up [n, out, r])`, and never cached.
    """
    linears = [linear for layer in layers for linear in layer_linears(layer)]
    joint = [linear for linear in linears if isinstance(linear, JointLinear)]
    if joint:
        return _joint_pairs(decoder, joint)
    adapters: list[Adapter] = []
    for linear in linears:
        adapters += active_adapters(linear)
    key, version = tuple(map(id, layers)), None
    cache: dict[Any, tuple[Any, dict[int, Pair]]] = {}
    if not (decoder.training or torch.is_grad_enabled()):
        factors = [factor for adapter in adapters for factor in adapter.factors().values()]
        if (counts := version_counters(factors)) is not None:
            places = tuple((id(adapter.linear), adapter.name, adapter.scaling) for adapter in adapters)
            version = places, counts, tuple(factor.data_ptr() for factor in factors)
        cache = decoder.pair_cache = decoder.pair_cache or {}
        if version is not None and key in cache and cache[key][0] == version:
            return cache[key][1]
    pairs = concatenate_pairs(adapters, materialize(adapters))
    if version is not None:
        cache[key] = version, pairs
    return pairs


def _joint_pairs(decoder: Any, linears: list[JointLinear]) -> dict[int, Pair]:
    """Return the stacked pairs of linears that several trials adapt."""
    decoder.joint_blocks = decoder.joint_blocks or {}
    key = tuple(map(id, linears))
    if key not in decoder.joint_blocks:
        decoder.joint_blocks[key] = AdapterBlocks([block for linear in linears for block in linear.adapter_blocks()])
    pairs = iter(decoder.joint_blocks[key].pairs())
    by_linear: dict[int, Pair] = {}
    for linear in linears:
        of_blocks = [next(pairs) for _ in linear.blocks]
        if of_blocks:
            by_linear[id(linear)] = stack_blocks(linear.blocks, of_blocks, len(linear.layers))
    return by_linear


def stack_blocks(blocks: Sequence[slice], pairs: Sequence[Pair], trials: int) -> Pair:
    """Return one stack of the pairs of a linear's blocks of trials: zeros beyond a rank, and where a trial has none."""
    if len(blocks) == 1 and blocks[0] == slice(0, trials):
        return pairs[0]
    rank = max(down.shape[1] for down, _ in pairs)
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    done = 0
    for block, (down, up) in zip((*blocks, slice(trials, trials)), (*pairs, (None, None)), strict=True):
        like_down, like_up = pairs[0]
        downs.append(like_down.new_zeros(block.start - done, rank, like_down.shape[2]))
        ups.append(like_up.new_zeros(block.start - done, like_up.shape[1], rank))
        if down is not None and up is not None:
            downs.append(functional.pad(down, (0, 0, 0, rank - down.shape[1])))
            ups.append(functional.pad(up, (0, rank - up.shape[2])))
        done = block.stop
    return torch.cat(downs), torch.cat(ups)


def document_boundaries(arguments: dict[str, Any], length: int, rows: int = 1) -> tuple[Tensor | None, int]:
    """Return the boundaries of the documents packed in rows of `length` tokens, and the longest's length.

    They come from the collator (transformers' names), or from positions that do not increase by one, which costs a
    synchronization with the GPU per forward.

    Raises:
        UserError: if the collator's boundaries are not those of rows of this length.
    """
    given = arguments.get("cu_seq_lens_q")
    if given is not None:
        if given.is_cuda:
            torch._assert_async(given[-1] == rows * length)  # no synchronization: the GPU reports it
        elif int(given[-1]) != rows * length:
            raise UserError(f"cu_seq_lens_q ends at {int(given[-1])}, but the packed rows have {rows * length} tokens")
        return given.to(torch.int32), int(arguments["max_length_q"])
    positions = arguments.get("position_ids")
    if positions is None or positions.shape != (rows, length):
        return None, 0
    flat = positions.reshape(-1)
    begins = flat.diff() != 1
    begins[length - 1 :: length] = True
    starts = begins.nonzero().flatten() + 1
    if len(starts) < rows:
        return None, 0
    ends = torch.tensor([len(flat)], device=flat.device)
    boundaries = torch.cat([torch.zeros_like(ends), starts, ends]).to(torch.int32)
    return boundaries, int(boundaries.diff().max())


def layer_positions(layer: Any, hidden: Tensor, context: ForwardContext, arguments: dict[str, Any]) -> Positions:
    """Return the positions that `DecoderLayerFunction` takes, from a layer's keyword arguments."""
    cos, sin = arguments["position_embeddings"]
    batch, length = hidden.shape[:2]
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"position embeddings are {tuple(cos.shape)}; expected 1 or {batch} in the first dimension")
    longest, scale, shared = context.max_seqlen or length, layer.self_attn.scaling, context.shared
    window = _window_of(layer, longest if shared is None else shared.max_seqlen)
    documents = 0 if context.cu_seqlens is None else len(context.cu_seqlens) - 1
    if documents * longest == batch * length and shared is None:
        # documents of one length are a batch's sequences, on which attention is faster
        batch, documents = documents, 0
    if documents:
        bounds = {"cu_seqlens": context.cu_seqlens, "max_seqlen": longest, "shared": shared}
        sequences = Sequences(scale, window=window, **bounds)
    elif context.cu_seqlens is None and not context.causal_only and arguments.get("attention_mask") is not None:
        sequences = Sequences(scale, mask=arguments["attention_mask"])  # transformers' includes causality and window
    else:
        sequences = Sequences(scale, window=window)
    return Positions(
        batch, cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]), sequences, context.gradient_buffer
    )


def packed_mask(layer: Any, hidden: Tensor, context: ForwardContext) -> Tensor:
    """Return what stands for the mask `[B, 1, S, S]` of packed documents that transformers makes for a layer."""
    shared, scale = context.shared, layer.self_attn.scaling
    window = _window_of(layer, context.max_seqlen if shared is None else shared.max_seqlen)
    sequences = Sequences(scale, None, context.cu_seqlens, context.max_seqlen, window, shared)
    if is_fake(hidden):
        return dense_mask(hidden.shape[0], hidden.shape[1], sequences, hidden.device)
    return DocumentMask.of(sequences, hidden)


def _window_of(layer: Any, longest: int) -> int | None:
    """Return the sliding window of a layer's attention, where it has one that is shorter than the longest document."""
    attention = layer.self_attn
    window = None
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    elif "Mistral" in type(attention).__name__:  # which reads it from the configuration
        window = getattr(attention.config, "sliding_window", None)
    return None if window is None or window >= longest else window
