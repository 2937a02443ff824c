"""What the forward and the backward pass of a fused decoder layer share: its modules, positions, and saved tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsr_scale.adapters.pairs import Pair
from lsr_scale.fused.eight_bit_group import EightBitGroup, EightBitState
from lsr_scale.fused.joint_group import JointGroup
from lsr_scale.fused.linear_groups import CachedMatrix, LinearGroup
from lsr_scale.kernels.attention import Sequences

Recompute = Literal["none", "mlp", "full"]
SavedTensors = dict[str, Tensor]

# a decoder layer's linears, by the submodule that they are in
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
# linears that share an input, by their places among the seven: each group has one matrix, which a layer may cache
GROUPS = {"qkv": slice(0, 3), "o": slice(3, 4), "gate_up": slice(4, 6), "down": slice(6, 7)}


def layer_linears(layer: Any) -> list[nn.Module]:
    """Return a decoder layer's seven linears: q, k, v, o, gate, up, down."""
    return [getattr(getattr(layer, part), name) for part, names in LINEARS.items() for name in names]


def is_saved(name: str, recompute: Recompute) -> bool:
    """Tell whether a tensor is saved for the backward pass; x, and `xa` of down_proj's adapter, always are."""
    if recompute == "full":
        return name in ("x", "xa_down")
    return recompute == "none" or name not in ("gate_up", "xa_gate_up")


@dataclass(frozen=True)
class LayerSizes:
    """What a layer may spend memory on.

    Attributes:
        saved_per_token: Bytes of saved tensors per token, by what is recomputed.
        cached_weights: Bytes of its dequantized matrices.
        dtype: Of the latter.
    """

    saved_per_token: dict[Recompute, float]
    cached_weights: int
    dtype: torch.dtype


@dataclass
class GradientBuffer:
    """The input gradient that a layer's backward pass returned last, `[T, N]` in a buffer `[T, N + R]`.

    The layer below finds room for its `dY up` beside it, and copies nothing. Whatever else autograd does with the
    gradient in between (add another one, call hooks) leaves a tensor at another address, or the sum at this one.
    """

    buffer: Tensor | None = None

    def take(self, grad: Tensor, width: int) -> Tensor | None:
        """Return the buffer if `grad [T, N]` lies in it and is followed by `width` columns; only once."""
        buffer, self.buffer = self.buffer, None
        if buffer is None or buffer.data_ptr() != grad.data_ptr() or buffer.dtype != grad.dtype:
            return None
        fits = buffer.shape == (len(grad), grad.shape[1] + width) and grad.stride() == buffer.stride()
        return buffer if fits else None


@dataclass
class Positions:
    """The positions of a batch's tokens, and what each attends to.

    Attributes:
        batch: Number of sequences B of the batch.
        cos: `[P, head_dim]`, P = S (the same for every sequence) or B * S.
        sin: As cos.
        sequences: Mask, packed documents, window; `scale` is the layer's own.
        gradient_buffer: What a layer's backward pass leaves for that of the layer below.
    """

    batch: int
    cos: Tensor
    sin: Tensor
    sequences: Sequences
    gradient_buffer: GradientBuffer = field(default_factory=GradientBuffer)


class LayerModules:
    """A decoder layer's linears in groups, its norms and head counts, as a forward or backward pass reads them."""

    def __init__(self, module: Any, pairs: list[Pair | None], eight_bit: Mapping[str, EightBitState]) -> None:
        """Take a layer, its pairs, and which of its groups compute in 8 bits, with what they keep for it."""
        linears = module.fallback_check.base_layers
        # what trains in 8 bits and is evaluated in bfloat16 caches no second form of its weights
        cache = {} if module.eight_bit and not eight_bit else module.weight_cache
        self.qkv, self.o, self.gate_up, self.down = (
            _group(linears[part], pairs[part], cache.get(name), eight_bit.get(name)) for name, part in GROUPS.items()
        )
        self.norm_1, self.norm_2 = module.input_layernorm, module.post_attention_layernorm
        self.q_norm: Any = getattr(module.self_attn, "q_norm", None)
        self.k_norm: Any = getattr(module.self_attn, "k_norm", None)
        self.head_dim: int = module.self_attn.head_dim
        self.heads, self.kv_heads = (size // self.head_dim for size in self.qkv.sizes[:2])

    def split_heads(self, qkv: Tensor, batch: int) -> list[Tensor]:
        """Return q, k, v as views `[B, S, heads, head_dim]` of `qkv [T, N]`."""
        parts = qkv.split(self.qkv.sizes, dim=1)
        return [part.unflatten(1, (-1, self.head_dim)).unflatten(0, (batch, -1)) for part in parts]


def _group(
    linears: Sequence[nn.Module],
    pairs: Sequence[Pair | None],
    cache: CachedMatrix | None,
    eight_bit: EightBitState | None,
) -> LinearGroup:
    if eight_bit is not None:
        return EightBitGroup(linears, pairs, cache, eight_bit)
    # pairs of several trials are stacked
    joint = any(pair is not None and pair[0].dim() == 3 for pair in pairs)
    return (JointGroup if joint else LinearGroup)(linears, pairs, cache)


def pop_or_dequantize(matrices: dict[str, Any], name: str, group: LinearGroup, like: Tensor) -> Any:
    """Return a group's matrix: the one that the recomputation dequantized, or a new one."""
    matrix = matrices.pop(name, None)
    return group.matrix(like.dtype, like.device) if matrix is None else matrix
