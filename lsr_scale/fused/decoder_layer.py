"""A decoder layer of the LLaMA family as one autograd function, on a frozen base with low-rank pairs.

    n1 = rms_norm(x);        q, k, v = n1 [W_qkv + up down]^T;     q, k rotated
    m  = x + attention(q, k, v) [W_o + up down]^T
    n2 = rms_norm(m);        gate, up = n2 [W_gate_up + up down]^T
    y  = m + (silu(gate) * up) [W_down + up down]^T

Each bracket is one GEMM over a group's matrix (see `groups`). Kept for the backward pass, per token: x, q k v, the
attention's output, m, gate and up (92 KB a layer on Mistral-7B, everything else is made again elementwise or is tiny);
with `recompute="mlp"` all but gate and up (36 KB); with `recompute="full"` x alone (8 KB), and then the backward pass
computes the layer again up to gate and up: SwiGLU's output and the GEMM of down_proj are never needed twice. Matrices
dequantized for that are used again for the input gradients.

No weight is kept, only the module: it is read again in the backward pass.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsr_scale.fused.linear_groups import Group, mm_float
from lsr_scale.fused.pairs import Pair
from lsr_scale.kernels.attention import Sequences, attention, attention_backward
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_project
from lsr_scale.kernels.rotary import rotate
from lsr_scale.kernels.swiglu import swiglu, swiglu_backward, swiglu_pair_gradients
from lsr_scale.kernels.swiglu_project import swiglu_project

Recompute = Literal["none", "mlp", "full"]
Kept = dict[str, Tensor]

# a decoder layer's linears, by the part that holds them
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def linears_of(layer: Any) -> list[nn.Module]:
    """Return a decoder layer's seven linears: q, k, v, o, gate, up, down."""
    return [getattr(getattr(layer, part), name) for part, names in LINEARS.items() for name in names]


# those that share an input, whose matrices a layer may hold
GROUPS = ("qkv", "o", "gate_up", "down")


def _stays(name: str, recompute: Recompute) -> bool:
    """Tell whether something is kept for the backward pass; x, and what down_proj's adapter needs, always are."""
    if recompute == "full":
        return name in ("x", "xa_down")
    return recompute == "none" or name not in ("gate_up", "xa_gate_up")


@dataclass(frozen=True)
class LayerSizes:
    """What a layer may keep.

    Attributes:
        kept: Bytes a token for the backward pass, by what is computed again.
        matrices: Bytes of its dequantized matrices.
        dtype: Of both, but for some statistics.
    """

    kept: dict[Recompute, float]
    matrices: int
    dtype: torch.dtype


@dataclass
class Handed:
    """The gradient that a layer's backward pass handed down last, `[T, N]` in a buffer `[T, N + R]`.

    The layer below finds room for its `dY up` beside it, and copies nothing. Whatever else autograd does with the
    gradient in between (add another one, call hooks) leaves a tensor at another address, or the sum at this one.
    """

    buffer: Tensor | None = None

    def take(self, grad: Tensor, width: int) -> Tensor | None:
        """Return the buffer if `grad [T, N]` lies in it and is followed by so many columns; it is given once."""
        buffer, self.buffer = self.buffer, None
        if buffer is None or buffer.data_ptr() != grad.data_ptr() or buffer.dtype != grad.dtype:
            return None
        fits = buffer.shape == (len(grad), grad.shape[1] + width) and grad.stride() == buffer.stride()
        return buffer if fits else None


@dataclass
class Positions:
    """Where tokens stand and whom they see: one for all layers of a forward pass.

    Attributes:
        batch: Number of rows B of the batch.
        cos: `[P, head_dim]`, P = S (every row alike) or B * S.
        sin: As cos.
        sequences: Mask, packed documents, window; `scale` is the layer's own.
        handed: What goes down from layer to layer in the backward pass.
    """

    batch: int
    cos: Tensor
    sin: Tensor
    sequences: Sequences
    handed: Handed = field(default_factory=Handed)


class _Layer:
    """What a pass reads from a layer's module."""

    def __init__(self, module: Any, pairs: list[Pair | None]) -> None:
        linears, held = module.verdict.bases, module.held
        parts = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))
        self.qkv, self.o, self.gate_up, self.down = (
            Group(linears[part], pairs[part], held.get(name)) for name, part in zip(GROUPS, parts, strict=True)
        )
        self.norm_1, self.norm_2 = module.input_layernorm, module.post_attention_layernorm
        self.q_norm: Any = getattr(module.self_attn, "q_norm", None)
        self.k_norm: Any = getattr(module.self_attn, "k_norm", None)
        self.head_dim: int = module.self_attn.head_dim
        self.heads, self.kv_heads = (size // self.head_dim for size in self.qkv.sizes[:2])

    def heads_of(self, qkv: Tensor, batch: int) -> list[Tensor]:
        """Return q, k, v as views `[B, S, heads, head_dim]` of the rows of `[T, N]`."""
        parts = qkv.split(self.qkv.sizes, dim=1)
        return [part.unflatten(1, (-1, self.head_dim)).unflatten(0, (batch, -1)) for part in parts]


class DecoderLayerFunction(torch.autograd.Function):
    """`y = layer(x)`; gradients to x and to every pair."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Any, positions: Positions, recompute: Recompute, *pairs: Tensor | None
    ) -> Tensor:
        """Run the layer.

        Args:
            ctx: Autograd's.
            x: Hidden states `[B, S, hidden]`.
            module: The decoder layer, of a class made by `fuse`.
            positions: See `Positions`.
            recompute: What the backward pass computes again.
            pairs: down and up of each of `linears_of(module)`, or None twice.
        """
        ctx.module, ctx.positions = module, positions
        layer = _Layer(module, _paired(pairs))
        kept: Kept = {"x": x.reshape(-1, x.shape[-1])}
        with torch.autocast(x.device.type, enabled=False):
            _attend(layer, kept, positions, {})
            _gate_up(layer, kept, {})
            y = _down(layer, kept)
        if module.sizes is None:
            module.sizes = _sizes(layer, kept)
        kept = {name: value for name, value in kept.items() if _stays(name, recompute)}
        ctx.names = list(kept)
        ctx.save_for_backward(*kept.values(), *pairs)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x and of each pair (float32)."""
        (grad,) = grads
        tensors = ctx.saved_tensors
        kept: Kept = dict(zip(ctx.names, tensors[: len(ctx.names)], strict=True))
        pairs = tensors[len(ctx.names) :]
        layer = _Layer(ctx.module, _paired(pairs))
        matrices: dict[str, Tensor] = {}
        with torch.autocast(grad.device.type, enabled=False):
            if "qkv" not in kept:
                _attend(layer, kept, ctx.positions, matrices)
            if "gate_up" not in kept:
                _gate_up(layer, kept, matrices)
            grad_rows = grad.reshape(-1, grad.shape[-1])
            d_middle, d_mlp = _mlp_backward(layer, kept, matrices, grad_rows, ctx.positions.handed)
            d_x, d_attention = _attention_backward(
                layer, kept, ctx.positions, matrices, d_middle, ctx.needs_input_grad[0]
            )
        flat = [part for pair in (*d_attention, *d_mlp) for part in pair]
        return d_x.view(grad.shape) if d_x is not None else None, None, None, None, *flat


def _sizes(layer: _Layer, kept: Kept) -> LayerSizes:
    """Return the sizes of a layer from all that its forward pass made."""
    x = kept["x"]
    by_level = {
        level: sum(value.nbytes for name, value in kept.items() if _stays(name, level)) / max(1, len(x))
        for level in get_args(Recompute)
    }
    groups = layer.qkv, layer.o, layer.gate_up, layer.down
    weights = sum((group.out_features + group.width) * (group.in_features + group.width) for group in groups)
    return LayerSizes(by_level, weights * x.element_size(), x.dtype)


def _paired(flat: tuple[Tensor | None, ...]) -> list[Pair | None]:
    return [None if down is None or up is None else (down, up) for down, up in zip(flat[::2], flat[1::2], strict=True)]


def _attend(layer: _Layer, kept: Kept, positions: Positions, matrices: dict[str, Tensor]) -> None:
    """From x to the output of o_proj; `matrices` receives what was dequantized."""
    x = kept["x"]
    tokens = len(x)
    matrix = matrices["qkv"] = layer.qkv.matrix(x.dtype, x.device)
    normed = _norm(layer.qkv, layer.norm_1, x, matrix, kept, ("rstd_1", "xa_qkv"))
    qkv = kept["qkv"] = layer.qkv.multiply(normed, matrix)
    del normed
    rotated = (layer.heads + layer.kv_heads) * layer.head_dim
    if layer.q_norm is None:
        both = qkv[:, :rotated].unflatten(1, (-1, layer.head_dim))
        rotate(both, positions.cos, positions.sin, both)
    else:
        for name, norm, part in zip("qk", (layer.q_norm, layer.k_norm), qkv.split(layer.qkv.sizes, 1), strict=False):
            heads = part.unflatten(1, (-1, layer.head_dim))
            kept[name] = heads.new_empty(heads.shape)
            kept["rstd_" + name] = rms_norm(heads, norm.weight, norm.variance_epsilon, kept[name])
            rotate(kept[name], positions.cos, positions.sin, kept[name])
    q, k, v = _qkv_heads(layer, kept, positions.batch)
    attended, statistics = attention(q, k, v, positions.sequences)
    kept["attended"] = attended.reshape(tokens, -1)
    kept |= {f"attention_{index}": value for index, value in enumerate(statistics)}
    matrices["o"] = layer.o.matrix(x.dtype, x.device)
    # for _gate_up, which takes it away
    kept["attention_out"], xa = layer.o.project(kept["attended"], matrices["o"])
    if xa is not None:
        kept["xa_o"] = xa


def _qkv_heads(layer: _Layer, kept: Kept, batch: int) -> list[Tensor]:
    """Return q, k, v as attention reads them, `[B, S, heads, head_dim]`."""
    heads = layer.heads_of(kept["qkv"], batch)
    if layer.q_norm is not None:
        for index, name in enumerate("qk"):
            heads[index] = kept[name].view(heads[index].shape)
    return heads


def _gate_up(layer: _Layer, kept: Kept, matrices: dict[str, Tensor]) -> None:
    """From the attention's output, or from m, to gate and up."""
    x = kept["x"]
    matrix = matrices["gate_up"] = layer.gate_up.matrix(x.dtype, x.device)
    names = "rstd_2", "xa_gate_up"
    if "middle" in kept:
        normed = _norm(layer.gate_up, layer.norm_2, kept["middle"], matrix, kept, names)
    else:
        out, kept["middle"] = kept.pop("attention_out"), torch.empty_like(x)
        sums = {"residual": x, "residual_out": kept["middle"]}
        normed = _norm(layer.gate_up, layer.norm_2, out, matrix, kept, names, **sums)
    kept["gate_up"] = layer.gate_up.multiply(normed, matrix)


def _norm(
    group: Group, norm: Any, x: Tensor, matrix: Tensor, kept: Kept, names: tuple[str, str], **sums: Tensor
) -> Tensor:
    """Return a group's input `[T, K + R]`, the normalized x and its `x down^T`; keep rstd and the latter by `names`."""
    normed = group.input_buffer(len(x), x)
    if not group.width:
        kept[names[0]] = rms_norm(x, norm.weight, norm.variance_epsilon, normed, **sums)
        return normed
    xa = kept[names[1]] = x.new_empty(len(x), group.width)
    downs, rank = group.downs(matrix), sum(group.ranks)
    kept[names[0]] = rms_norm_project(x, norm.weight, norm.variance_epsilon, normed, downs, xa, rank=rank, **sums)
    return normed


def _down(layer: _Layer, kept: Kept) -> Tensor:
    """From gate and up to y."""
    down, gate_up = layer.down, kept["gate_up"]
    matrix = down.matrix(gate_up.dtype, gate_up.device)
    hidden = down.input_buffer(len(gate_up), gate_up)
    if down.width:
        kept["xa_down"] = gate_up.new_empty(len(gate_up), down.width)
        swiglu_project(gate_up, hidden, down.downs(matrix), kept["xa_down"], rank=sum(down.ranks))
    else:
        swiglu(gate_up, hidden)
    return down.multiply(hidden, matrix).add_(kept["middle"])


def _mlp_backward(
    layer: _Layer, kept: Kept, matrices: dict[str, Tensor], grad: Tensor, handed: Handed
) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """Return dm as the buffer `[T, hidden + R_o]` that `o` reads, and the gradients of the pairs of gate, up, down."""
    tokens, width = grad.shape
    gate_up = layer.gate_up
    d_hidden, ds_down, d_up_down = _down_backward(layer.down, kept, grad, handed)
    d_gate_up = gate_up.gradient_buffer(tokens, grad)
    inner = d_gate_up[:, : gate_up.out_features]
    d_ups, d_down_down = _swiglu_backward(layer, kept, d_hidden, ds_down, inner)
    del d_hidden

    matrix = _take(matrices, "gate_up", gate_up, grad)
    gate_up.fill_tail(d_gate_up, matrix)
    d_normed = gate_up.input_gradient(d_gate_up, matrix)
    d_downs: list[Tensor | None] = [None, None]
    if gate_up.width:
        d_downs = _down_gradients(gate_up, gate_up.tail(d_gate_up), kept["middle"], kept["rstd_2"], layer.norm_2)
    del d_gate_up, inner, matrix
    d_middle = layer.o.gradient_buffer(tokens, grad)
    rms_norm_backward(
        d_normed, kept["middle"], layer.norm_2.weight, kept["rstd_2"], d_middle[:, :width], residual_grad=grad
    )
    return d_middle, [*zip(d_downs, d_ups, strict=True), (d_down_down, d_up_down)]


def _down_backward(
    down: Group, kept: Kept, grad: Tensor, handed: Handed
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of SwiGLU's output, and for down_proj's adapter ds `[T, R]` and `d up`."""
    matrix = down.matrix(grad.dtype, grad.device)
    if not down.width:
        return down.input_gradient(grad, matrix), None, None
    extended = handed.take(grad, down.width)
    if extended is None:
        extended = down.extended(grad)
    (d_up,) = down.output_products(extended, kept["xa_down"], matrix)
    return down.input_gradient(extended, matrix), down.tail(extended).clone(), d_up


def _swiglu_backward(
    layer: _Layer, kept: Kept, d_hidden: Tensor, ds_down: Tensor | None, d_gate_up: Tensor
) -> tuple[list[Tensor | None], Tensor | None]:
    """Fill `d_gate_up [T, 2F]`; return `d up` of gate's and up's adapters and `d down` of down_proj's."""
    (gate_rank, up_rank), (down_rank,) = layer.gate_up.ranks, layer.down.ranks
    # beyond that the accumulators leave no registers, and separate products are faster
    if ds_down is not None and gate_rank and up_rank and max(gate_rank, up_rank, down_rank) <= 32:
        d_gate, d_up, d_down = swiglu_pair_gradients(
            d_hidden,
            kept["gate_up"],
            kept["xa_gate_up"],
            (0, gate_rank),
            (gate_rank, up_rank),
            ds_down,
            down_rank,
            d_gate_up,
        )
        return [d_gate, d_up], d_down
    hidden = None if ds_down is None else d_hidden.new_empty(d_hidden.shape)
    swiglu_backward(d_hidden, kept["gate_up"], d_gate_up, hidden)
    d_ups: list[Tensor | None] = [None, None]
    if layer.gate_up.width:
        d_ups = layer.gate_up.up_gradients(d_gate_up, kept["xa_gate_up"])
    if ds_down is None or hidden is None:
        return d_ups, None
    return d_ups, mm_float(ds_down.t(), hidden)[:down_rank]


def _attention_backward(
    layer: _Layer,
    kept: Kept,
    positions: Positions,
    matrices: dict[str, Tensor],
    d_middle: Tensor,
    wants_x: bool,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Return dx, and the gradients of the pairs of q, k, v, o."""
    tokens, width = kept["x"].shape
    o, qkv = layer.o, layer.qkv
    o_matrix = _take(matrices, "o", o, d_middle)
    o_pair: tuple[Tensor | None, Tensor | None] = (None, None)
    if o.width:
        (d_up,) = o.output_products(d_middle, kept["xa_o"], o_matrix)
        (d_down,) = o.down_gradients(mm_float(o.tail(d_middle).t(), kept["attended"]))
        o_pair = d_down, d_up
    d_attended = o.input_gradient(d_middle, o_matrix)
    del o_matrix

    q, k, v = _qkv_heads(layer, kept, positions.batch)
    statistics = tuple(kept[f"attention_{index}"] for index in range(3) if f"attention_{index}" in kept)
    d_q, d_k, d_v = attention_backward(
        d_attended.view(q.shape), q, k, v, kept["attended"].view(q.shape), statistics, positions.sequences
    )
    d_qkv = qkv.gradient_buffer(tokens, d_middle)
    outs = layer.heads_of(d_qkv[:, : qkv.out_features], positions.batch)
    raw = kept["qkv"].split(qkv.sizes, 1)
    for index, (gradient, norm) in enumerate(zip((d_q, d_k), (layer.q_norm, layer.k_norm), strict=True)):
        rows, out = gradient.flatten(0, 1), outs[index].flatten(0, 1)
        if norm is None:
            rotate(rows, positions.cos, positions.sin, out, inverse=True)
            continue
        turned = rows.new_empty(rows.shape)
        rotate(rows, positions.cos, positions.sin, turned, inverse=True)
        heads = raw[index].unflatten(1, (-1, layer.head_dim))
        rms_norm_backward(turned, heads, norm.weight, kept["rstd_" + "qk"[index]], out)
    outs[2].copy_(d_v)
    del d_q, d_k, d_v

    matrix = _take(matrices, "qkv", qkv, d_middle)
    qkv_pairs: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * 3
    if qkv.width:
        d_ups = qkv.output_products(d_qkv, kept["xa_qkv"], matrix)
        d_downs = _down_gradients(qkv, qkv.tail(d_qkv), kept["x"], kept["rstd_1"], layer.norm_1)
        qkv_pairs = list(zip(d_downs, d_ups, strict=True))
    d_x = None
    if wants_x:
        d_normed = qkv.input_gradient(d_qkv, matrix)
        buffer = positions.handed.buffer = layer.down.gradient_buffer(tokens, d_normed)
        d_x = buffer[:, :width]
        rms_norm_backward(
            d_normed, kept["x"], layer.norm_1.weight, kept["rstd_1"], d_x, residual_grad=d_middle[:, :width]
        )
    return d_x, [*qkv_pairs, o_pair]


def _down_gradients(group: Group, ds: Tensor, x: Tensor, rstd: Tensor, norm: Any) -> list[Tensor | None]:
    """Return each `d down_i = ds_i^T n`, n = x * rstd * weight; n is not made, its norm goes to the thin sides."""
    scaled = (ds * rstd[:, None]).to(ds.dtype)
    return group.down_gradients(mm_float(scaled.t(), x) * norm.weight)


def _take(matrices: dict[str, Tensor], name: str, group: Group, like: Tensor) -> Tensor:
    """Return a group's matrix, left by the recomputation or dequantized now."""
    found = matrices.pop(name, None)
    return group.matrix(like.dtype, like.device) if found is None else found
