"""Models whose decoder layers run fused: `fuse` and `unfuse`, by subclass.

Three classes of a model are replaced by subclasses of themselves, in place: the causal language model (its loss without
logits), the stack of layers (everything that all layers share is made once a forward) and each layer (which decides
at every forward whether it runs fused, see `eligibility`). Parameters, names, hooks and `isinstance` stay as they are.
An instance's `forward` is never set: transformers' checkpointing would then be lost without a word.
"""

import functools
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast, get_args

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from lsr_scale.adapters.peft import AdapterLinear, change_counts
from lsr_scale.errors import UserError
from lsr_scale.fused.attention_mask import needs_mask
from lsr_scale.fused.decoder_layer import (
    GROUPS,
    DecoderLayerFunction,
    Handed,
    LayerSizes,
    Positions,
    Recompute,
    linears_of,
)
from lsr_scale.fused.fallback import FAMILIES, LAYERS, why_not_call, why_not_head, why_not_layer, why_not_linear
from lsr_scale.fused.linear import LinearMixin
from lsr_scale.fused.linear_groups import HeldMatrix
from lsr_scale.fused.loss import causal_lm_loss
from lsr_scale.fused.pairs import Adapter, Pair, active_adapters, joined, materialize
from lsr_scale.kernels.attention import Sequences, dense_mask, keep_cudnn_from_masks
from lsr_scale.layers.frozen_linear import freeze_quantized

logger = logging.getLogger(__name__)

_STACKS = {getattr(module, name + "Model") for name, module in FAMILIES.items()}
_HEADS = {getattr(module, name + "ForCausalLM") for name, module in FAMILIES.items()}


@dataclass
class FusedForward:
    """What the layers of one forward pass share; handed down to them among their keyword arguments.

    Attributes:
        stack: The model around the layers.
        cu_seqlens: Boundaries of packed documents, or None.
        max_seqlen: Length of the longest.
        placeholder: Stands for the attention mask of packed documents, which has a square of the tokens and which only
            a layer that steps aside needs.
        plain: Every row is one document, without a mask of the caller's: a layer's own window says all there is.
    """

    stack: Any
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    placeholder: Tensor | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self.handed = Handed()
        self._reasons: dict[int, str | None] = {}
        self._pairs: dict[int, Pair] = {}
        self._chunks = _chunks(list(self.stack.layers))

    def reason(self, layer: nn.Module) -> str | None:
        """Return why a layer runs per linear in this forward pass, or None."""
        if id(layer) not in self._reasons:
            self._reasons[id(layer)] = why_not_layer(layer)
        return self._reasons[id(layer)]

    def pairs(self, layer: nn.Module) -> list[Tensor | None]:
        """Return down and up of each linear of a layer, or None twice; made with its chunk's when first asked for."""
        chunk = self._chunks.get(id(layer), [])
        for other in chunk:
            self._chunks.pop(id(other), None)
        if chunk:
            # reentrant checkpointing runs the layer without gradients, which the pairs need nevertheless
            with torch.set_grad_enabled(self._grad):
                self._pairs |= _pairs(self.stack, [other for other in chunk if self.reason(other) is None])
        flat: list[Tensor | None] = []
        for linear in linears_of(layer):
            flat += self._pairs.get(id(linear), (None, None))
        return flat


# layers whose pairs are made at once: many, for few launches, but few where the GPU waits for it, which is before the
# first layer and, in the backward pass, after it
_CHUNKS = (1, 3, 8, 20)


def _chunks(layers: list[nn.Module]) -> dict[int, list[nn.Module]]:
    """Return the chunk that each layer is in, by the layer's identity."""
    found: dict[int, list[nn.Module]] = {}
    start = 0
    for size in itertools.chain(_CHUNKS, itertools.repeat(_CHUNKS[-1])):
        if start >= len(layers):
            break
        chunk = layers[start : start + size]
        found |= {id(layer): chunk for layer in chunk}
        start += size
    return found


class _Fused:
    """Marks a class made by `fuse`; `mixin` and `original` are what it was made from."""

    original: type
    mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and pickles find the class by what it was made from: its own name stands in no module."""
        _, _, state, *rest = cast(Any, super().__reduce_ex__(protocol))
        kept = {name: value for name, value in state.items() if name != "verdict"}  # names classes like this one
        return (_new, (self.mixin, self.original), kept, *rest)


class FusedLayer(_Fused):
    """A decoder layer that runs as one autograd function where it can.

    `sizes` is known after the first forward; `held` are the matrices that stay in memory from pass to pass, by the
    group's name.
    """

    recompute: Recompute = "none"
    told: str | None = None
    sizes: LayerSizes | None = None
    verdict: Any = None  # what eligibility last said, and of what
    held: Mapping[str, HeldMatrix] = MappingProxyType({})

    def forward(self, hidden_states: Tensor, *args: Any, fused: FusedForward | None = None, **kwargs: Any) -> Tensor:
        """Run the layer, fused if `eligibility` finds nothing against it, else as its own class does."""
        module: Any = self
        if fused is None or args:
            reason = "called by other than its model"
        else:
            reason = fused.reason(module) or why_not_call(module, hidden_states, kwargs)
        if reason:
            if reason != self.told and module.training:
                logger.warning("%s %s runs per linear: %s", self.original.__name__, module.self_attn.layer_idx, reason)
                self.told = reason
            if fused is not None and fused.placeholder is not None and kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = _packed_mask(module, hidden_states, fused)
            run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
            if self.recompute == "none" or not (module.training and torch.is_grad_enabled()):
                return run(hidden_states, *args, **kwargs)
            # what was to save memory still does
            return checkpoint(run, hidden_states, *args, use_reentrant=False, **kwargs)  # pyright: ignore
        assert fused is not None
        positions = _positions(module, hidden_states, fused, kwargs)
        return DecoderLayerFunction.apply(hidden_states, self, positions, self.recompute, *fused.pairs(module))  # pyright: ignore


def _positions(layer: Any, hidden: Tensor, fused: FusedForward, arguments: dict[str, Any]) -> Positions:
    """Gather what `DecoderLayerFunction` asks from a layer's keyword arguments."""
    cos, sin = arguments["position_embeddings"]
    batch, length = hidden.shape[:2]
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"position embeddings are {tuple(cos.shape)}; expected 1 or {batch} rows of them")
    window, scale = _window_of(layer), layer.self_attn.scaling
    longest = fused.max_seqlen or length
    documents = 0 if fused.cu_seqlens is None else len(fused.cu_seqlens) - 1
    if documents * longest == length and batch == 1:
        # equally long documents are the rows of a batch, which attention is faster on
        batch, documents = documents, 0
    if window is not None and window >= longest:
        window = None
    if documents:
        sequences = Sequences(scale, cu_seqlens=fused.cu_seqlens, max_seqlen=longest, window=window)
    elif fused.cu_seqlens is None and not fused.plain and arguments.get("attention_mask") is not None:
        sequences = Sequences(scale, mask=arguments["attention_mask"])  # transformers' holds causality and window too
    else:
        sequences = Sequences(scale, window=window)
    return Positions(batch, cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]), sequences, fused.handed)


def _packed_mask(layer: Any, hidden: Tensor, fused: FusedForward) -> Tensor:
    """Return the bool mask `[1, 1, S, S]` of packed documents, as transformers would have made it for a layer."""
    sequences = Sequences(layer.self_attn.scaling, cu_seqlens=fused.cu_seqlens, window=_window_of(layer))
    return dense_mask(hidden.shape[1], sequences, hidden.device)[None, None]


def _window_of(layer: Any) -> int | None:
    """Return the sliding window of a layer's attention, where it has one."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    # Mistral's attention reads it from the configuration
    return getattr(attention.config, "sliding_window", None) if "Mistral" in type(attention).__name__ else None


class _FusedStack(_Fused):
    """A stack of decoder layers that makes once what all of them need: pairs, and boundaries of packed documents."""

    pair_cache: dict[Any, tuple[Any, dict[int, Pair]]] | None = None
    most_tokens: int = 0  # in one training forward so far
    mask_is_needed: bool | None = None  # None: nobody has asked

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; kept pairs are dropped (an engine may write factors unseen)."""
        self.pair_cache = None
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, *args: Any, mask_is_needed: bool | None = None, **kwargs: Any) -> Any:
        """Run the model. In training there is no key/value cache, whatever `use_cache` says: nothing would read it.

        Nor is there a mask in training that is not needed: see `needs_mask`, which is asked if nobody has asked it yet.
        """
        module: Any = self
        if module.training or torch.is_grad_enabled():
            self.pair_cache = None
        if module.training and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        fused = FusedForward(self)
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if module.training and isinstance(tokens, Tensor):
            self.most_tokens = max(self.most_tokens, tokens.shape[:2].numel())
        nothing_else = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
        if len(args) < 2 and nothing_else and isinstance(tokens, Tensor) and tokens.shape[0] == 1:
            fused.cu_seqlens, fused.max_seqlen = documents(kwargs, tokens.shape[1])
            cached = module.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
            if fused.cu_seqlens is not None and module.config._attn_implementation == "sdpa" and not cached:
                # four dimensions: transformers hands it on as it is
                fused.placeholder = kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=tokens.device)
        elif len(args) < 2 and module.training:
            asked = self.mask_is_needed if mask_is_needed is None else mask_is_needed
            needed = needs_mask(kwargs) if asked is None else asked
            kwargs["attention_mask"] = kwargs.get("attention_mask") if needed else None
        others = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        fused.plain = len(args) < 2 and all(other is None for other in others)
        return super().forward(*args, fused=fused, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def _pairs(stack: Any, layers: list[nn.Module]) -> dict[int, Pair]:
    """Return the pairs of the adapted linears of some layers; in evaluation kept until a factor changes."""
    adapters: list[Adapter] = []
    for layer in layers:
        adapters += [adapter for linear in linears_of(layer) for adapter in active_adapters(linear)]
    key, version = tuple(map(id, layers)), None
    cache: dict[Any, tuple[Any, dict[int, Pair]]] = {}
    if not (stack.training or torch.is_grad_enabled()):
        factors = [factor for adapter in adapters for factor in adapter.factors().values()]
        if (counts := change_counts(factors)) is not None:
            places = tuple((id(adapter.linear), adapter.name, adapter.scaling) for adapter in adapters)
            version = places, counts, tuple(factor.data_ptr() for factor in factors)
        cache = stack.pair_cache = stack.pair_cache or {}
        if version is not None and key in cache and cache[key][0] == version:
            return cache[key][1]
    pairs = joined(adapters, materialize(adapters))
    if version is not None:
        cache[key] = version, pairs
    return pairs


def documents(arguments: dict[str, Any], length: int) -> tuple[Tensor | None, int]:
    """Return the boundaries of the documents packed in a row of `length` tokens, and the longest's length.

    They are given by the collator (transformers' names), or told by positions that do not go on by one, which costs a
    wait for the GPU a forward.
    """
    given = arguments.get("cu_seq_lens_q")
    if given is not None:
        if given.is_cuda:
            torch._assert_async(given[-1] == length)  # without a wait: the GPU reports it
        elif int(given[-1]) != length:
            raise UserError(f"cu_seq_lens_q ends at {int(given[-1])}, but the packed row has {length} tokens")
        return given.to(torch.int32), int(arguments["max_length_q"])
    positions = arguments.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] != 1:
        return None, 0
    row = positions[0]
    starts = (row.diff() != 1).nonzero().flatten() + 1
    if not len(starts):
        return None, 0
    ends = torch.tensor([len(row)], device=row.device)
    boundaries = torch.cat([torch.zeros_like(ends), starts, ends]).to(torch.int32)
    return boundaries, int(boundaries.diff().max())


class _FusedLinear(LinearMixin, _Fused):
    """An adapted linear layer with the fused operations."""


class _FusedHead(_Fused):
    """A causal language model whose training loss is computed without the logits ever existing whole."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model; in training with labels, `logits` is None in what is returned."""
        module: Any = self
        needed = kwargs.pop("mask_is_needed", None)
        if labels is not None and module.training and not args and needed is None:
            needed = needs_mask(kwargs, labels)
        if labels is None or not module.training or args or why_not_head(module, kwargs):
            module.model.mask_is_needed = needed  # not an argument: a loss function of the user's would be given it
            try:
                return super().forward(*args, labels=labels, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                module.model.mask_is_needed = None
        return causal_lm_loss(module, labels, mask_is_needed=needed, **kwargs)


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        fused: Names of the decoder layers that will run fused.
        per_linear: Names of the decoder layers that will not, with the reason.
        linears: How many adapted linear layers have the fused operations by themselves, which they use where no
            fused layer does.
        unfused: Names of the adapted modules that have not, with the reason: they run as without `fuse`.
    """

    fused: list[str]
    per_linear: dict[str, str]
    linears: int = 0
    unfused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line."""
        if self.fused or self.per_linear:
            text = f"{len(self.fused)} of {len(self.fused) + len(self.per_linear)} decoder layers run fused"
            reasons = sorted(set(self.per_linear.values()))
            return text + (f"; the others per linear: {'; '.join(reasons)}" if reasons else "")
        names = ", ".join(FAMILIES)
        text = f"{self.linears} adapted linears fused one by one (whole layers fuse in {names} models)"
        reasons = sorted(set(self.unfused.values()))
        return text + (f"; {len(self.unfused)} adapted modules unfused: {'; '.join(reasons)}" if reasons else "")


def fuse(model: nn.Module, recompute: Recompute = "none", hold_weights: bool = False) -> FuseReport:
    """Make a model run fused, in place: faster, with less memory, the same function.

    For loops of your own. Call it on a PEFT model (LSR-Adapt, Kron-LoRA, LoRA) or a frozen one, after its adapters are
    there, before any wrapper (DeepSpeed, DDP). `unfuse` undoes it. In LLaMA, Mistral, Qwen2 and Qwen3 models whole
    decoder layers fuse, and the loss is computed without logits; in all others each adapted linear does by itself.
    From then on `scaled_dot_product_attention` chooses among its other backends than cuDNN in this process, whose
    gradients under a mask are not finite.

    Args:
        model: The model.
        recompute: What the backward pass of a decoder layer computes again instead of keeping it: "none", "mlp" (gate
            and up) or "full" (everything but the layer's input). Leave transformers' own gradient checkpointing off: a
            layer that cannot run fused is checkpointed whole. Models without such layers need their own.
        hold_weights: Dequantize the weights of fused layers once and hold them, in the dtype that they compute in,
            beside the quantized ones: 2 bytes a weight more, 13 GiB for a 7B model. `fit_memory` chooses by layer.

    Returns:
        Which layers run fused, and why others do not: those run as ever. Layers are asked again at every forward.

    Raises:
        UserError: if the model has neither such decoder layers nor adapters, or for an unknown `recompute`.
    """
    if recompute not in get_args(Recompute):
        raise UserError(f"recompute: expected one of {', '.join(get_args(Recompute))}; got {recompute!r}")
    freeze_quantized(model)
    keep_cudnn_from_masks()
    report = FuseReport([], {})
    for name, module in list(model.named_modules()):
        original = _original(module)
        for mixin, known in ((FusedLayer, LAYERS), (_FusedStack, _STACKS), (_FusedHead, _HEADS)):
            if original in known:
                module.__class__ = _subclass(mixin, original)
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            if isinstance(module, AdapterLinear | LoraLayer) and isinstance(base, nn.Linear):  # asked at every forward
                module.__class__ = _subclass(_FusedLinear, original)
            reason = why_not_linear(module)
            if reason:
                report.unfused[name] = reason
            else:
                report.linears += 1
        if isinstance(module, FusedLayer):
            module.recompute, module.sizes = recompute, None
            hold(module, hold_weights)
            reason = why_not_layer(module)
            if reason:
                report.per_linear[name] = reason
            else:
                report.fused.append(name)
    if not (report.fused or report.per_linear or report.linears or report.unfused):
        names = ", ".join(FAMILIES)
        raise UserError(f"{type(model).__name__} has no adapters, and no decoder layers that can fuse ({names})")
    return report


def hold(layer: Any, wanted: bool) -> None:
    """Have a fused decoder layer hold its dequantized weights from its next forward on, or no longer."""
    if bool(layer.held) != wanted:
        layer.held = {name: HeldMatrix() for name in GROUPS} if wanted else {}


def unfuse(model: nn.Module) -> None:
    """Give every module of a fused model its own class back; bitsandbytes layers stay in their frozen form."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module.original
            for name in (
                "recompute",
                "told",
                "sizes",
                "verdict",
                "held",
                "pair_cache",
                "most_tokens",
                "mask_is_needed",
            ):
                module.__dict__.pop(name, None)


def _original(module: nn.Module) -> type:
    return module.original if isinstance(module, _Fused) else type(module)


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _new(mixin: type, original: type) -> Any:
    """Return an empty instance of the subclass of both, for pickle, in whatever process."""
    found = _subclass(mixin, original)
    return found.__new__(found)  # pyright: ignore[reportCallIssue]


def _subclass(mixin: type, original: type) -> type:
    """Return the subclass of both, always the same one."""
    key = mixin, original
    if key not in _SUBCLASSES:
        name = "Fused" + original.__name__

        # generation and the Trainer read the signature to know what a model takes
        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)

        members = {"original": original, "mixin": mixin, "forward": forward, "__module__": __name__}
        _SUBCLASSES[key] = type(name, (mixin, original), members)
        if hasattr(original, "_can_record_outputs"):
            # transformers looks up by the class's name what hidden states and attentions are
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(_SUBCLASSES[key]), original._can_record_outputs)
    return _SUBCLASSES[key]
