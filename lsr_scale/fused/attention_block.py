"""The attention half of a fused decoder layer, from x to the output of o_proj: forward and backward pass."""

from typing import Any

from torch import Tensor

from lsr_scale.adapters.pairs import PairGradients
from lsr_scale.fused.layer_state import LayerModules, Positions, SavedTensors, pop_or_dequantize
from lsr_scale.kernels.attention import attention, attention_backward
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward
from lsr_scale.kernels.rotary import rotate


def forward(layer: LayerModules, saved: SavedTensors, positions: Positions, matrices: dict[str, Any]) -> None:
    """Compute the output of o_proj from x; `saved` receives what this made, `matrices` what was dequantized."""
    x = saved["x"]
    tokens = len(x)
    matrix = matrices["qkv"] = layer.qkv.matrix(x.dtype, x.device)
    normed, saved["rstd_1"], xa = layer.qkv.normed_input(layer.norm_1, x, matrix)
    if xa is not None:
        saved["xa_qkv"] = xa
    qkv = saved["qkv"] = layer.qkv.multiply(normed, matrix)
    del normed
    rotated = (layer.heads + layer.kv_heads) * layer.head_dim
    if layer.q_norm is None:
        both = qkv[:, :rotated].unflatten(1, (-1, layer.head_dim))
        rotate(both, positions.cos, positions.sin, both)
    else:
        for name, norm, part in zip("qk", (layer.q_norm, layer.k_norm), qkv.split(layer.qkv.sizes, 1), strict=False):
            heads = part.unflatten(1, (-1, layer.head_dim))
            saved[name] = heads.new_empty(heads.shape)
            saved["rstd_" + name] = rms_norm(heads, norm.weight, norm.variance_epsilon, saved[name])
            rotate(saved[name], positions.cos, positions.sin, saved[name])
    q, k, v = _qkv_heads(layer, saved, positions.batch)
    attended, statistics = attention(q, k, v, positions.sequences)
    saved["attended"] = attended.reshape(tokens, -1)
    saved |= {f"attention_{index}": value for index, value in enumerate(statistics)}
    matrices["o"] = layer.o.matrix(x.dtype, x.device)
    # for mlp_block.gate_up_forward, which pops it
    saved["attention_out"], xa = layer.o.project(saved["attended"], matrices["o"])
    if xa is not None:
        saved["xa_o"] = xa


def _qkv_heads(layer: LayerModules, saved: SavedTensors, batch: int) -> list[Tensor]:
    """Return q, k, v as attention reads them, `[B, S, heads, head_dim]`."""
    heads = layer.split_heads(saved["qkv"], batch)
    if layer.q_norm is not None:
        for index, name in enumerate("qk"):
            heads[index] = saved[name].view(heads[index].shape)
    return heads


def backward(
    layer: LayerModules,
    saved: SavedTensors,
    positions: Positions,
    matrices: dict[str, Any],
    d_middle: Tensor,
    codes: dict[str, Tensor],
    needs_d_x: bool,
) -> tuple[Tensor | None, list[PairGradients]]:
    """Return dx, and the gradients of the pairs of q, k, v, o.

    `codes` are those of dm, see `mlp_block.backward`; they are taken out and freed.
    """
    tokens, width = saved["x"].shape
    o, qkv = layer.o, layer.qkv
    o_matrix = pop_or_dequantize(matrices, "o", o, d_middle)
    o_pair: PairGradients = (None, None)
    if o.width:
        (d_up,) = o.output_products(d_middle, saved["xa_o"], o_matrix)
        (d_down,) = o.down_gradients(o.tail(d_middle), saved["attended"])
        o_pair = d_down, d_up
    gradient, _ = o.gradient_input(d_middle, o_matrix, codes=codes)
    d_attended = o.input_gradient(gradient, o_matrix)
    del gradient, o_matrix
    codes.clear()  # the caller has them too

    q, k, v = _qkv_heads(layer, saved, positions.batch)
    statistics = tuple(saved[f"attention_{index}"] for index in range(3) if f"attention_{index}" in saved)
    d_q, d_k, d_v = attention_backward(
        d_attended.view(q.shape), q, k, v, saved["attended"].view(q.shape), statistics, positions.sequences
    )
    d_qkv = qkv.gradient_buffer(tokens, d_middle)
    outs = layer.split_heads(d_qkv[:, : qkv.out_features], positions.batch)
    raw = saved["qkv"].split(qkv.sizes, 1)
    for index, (gradient, norm) in enumerate(zip((d_q, d_k), (layer.q_norm, layer.k_norm), strict=True)):
        rows, out = gradient.flatten(0, 1), outs[index].flatten(0, 1)
        if norm is None:
            rotate(rows, positions.cos, positions.sin, out, inverse=True)
            continue
        turned = rows.new_empty(rows.shape)
        rotate(rows, positions.cos, positions.sin, turned, inverse=True)
        heads = raw[index].unflatten(1, (-1, layer.head_dim))
        rms_norm_backward(turned, heads, norm.weight, saved["rstd_" + "qk"[index]], out)
    outs[2].copy_(d_v)
    del d_q, d_k, d_v

    matrix = pop_or_dequantize(matrices, "qkv", qkv, d_middle)
    qkv_pairs: list[PairGradients] = [(None, None)] * 3
    if qkv.width:
        d_ups = qkv.output_products(d_qkv, saved["xa_qkv"], matrix)
        d_downs = qkv.normed_down_gradients(qkv.tail(d_qkv), saved["x"], saved["rstd_1"], layer.norm_1)
        qkv_pairs = list(zip(d_downs, d_ups, strict=True))
    d_x = None
    if needs_d_x:
        gradient, _ = qkv.gradient_input(d_qkv, matrix)
        d_normed = qkv.input_gradient(gradient, matrix)
        buffer = positions.gradient_buffer.buffer = layer.down.gradient_buffer(tokens, d_normed)
        d_x = buffer[:, :width]
        rms_norm_backward(
            d_normed, saved["x"], layer.norm_1.weight, saved["rstd_1"], d_x, residual_grad=d_middle[:, :width]
        )
    return d_x, [*qkv_pairs, o_pair]
