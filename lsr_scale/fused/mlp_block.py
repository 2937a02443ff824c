"""The MLP half of a fused decoder layer, from the output of o_proj to y: forward and backward pass."""

from typing import Any

import torch
from torch import Tensor

from lsr_scale.adapters.pairs import PairGradients
from lsr_scale.fused.layer_state import GradientBuffer, LayerModules, SavedTensors, pop_or_dequantize
from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.kernels.rms_norm import rms_norm_backward
from lsr_scale.kernels.swiglu import swiglu_backward
from lsr_scale.kernels.swiglu_pair_gradients import swiglu_pair_gradients


def gate_up_forward(layer: LayerModules, saved: SavedTensors, matrices: dict[str, Any]) -> None:
    """Compute gate and up from the output of o_proj, or from m if that was saved; see `attention_block.forward`."""
    x = saved["x"]
    matrix = matrices["gate_up"] = layer.gate_up.matrix(x.dtype, x.device)
    if "middle" in saved:
        normed, saved["rstd_2"], xa = layer.gate_up.normed_input(layer.norm_2, saved["middle"], matrix)
    else:
        out, saved["middle"] = saved.pop("attention_out"), torch.empty_like(x)
        sums = {"residual": x, "residual_out": saved["middle"]}
        normed, saved["rstd_2"], xa = layer.gate_up.normed_input(layer.norm_2, out, matrix, **sums)
    if xa is not None:
        saved["xa_gate_up"] = xa
    saved["gate_up"] = layer.gate_up.multiply(normed, matrix)


def down_forward(layer: LayerModules, saved: SavedTensors) -> Tensor:
    """Return y from gate and up."""
    down, gate_up = layer.down, saved["gate_up"]
    matrix = down.matrix(gate_up.dtype, gate_up.device)
    hidden, xa = down.swiglu_input(gate_up, matrix)
    if xa is not None:
        saved["xa_down"] = xa
    return down.multiply(hidden, matrix).add_(saved["middle"])


def backward(
    layer: LayerModules, saved: SavedTensors, matrices: dict[str, Any], grad: Tensor, gradient_buffer: GradientBuffer
) -> tuple[Tensor, dict[str, Tensor], list[PairGradients]]:
    """Return dm as the buffer `[T, hidden + R_o]` that `o` reads, its codes, and the gradients of the pairs.

    The pairs are those of gate, up and down; the codes are `o.gradient_codes`.
    """
    tokens, width = grad.shape
    gate_up = layer.gate_up
    d_hidden, ds_down, d_up_down = _down_backward(layer.down, saved, grad, gradient_buffer)
    d_gate_up = gate_up.gradient_buffer(tokens, grad)
    inner = d_gate_up[:, : gate_up.out_features]
    d_ups, d_down_down = _swiglu_backward(layer, saved, d_hidden, ds_down, inner)
    del d_hidden

    matrix = pop_or_dequantize(matrices, "gate_up", gate_up, grad)
    gradient, ds = gate_up.gradient_input(d_gate_up, matrix, fill_tail=True)
    del d_gate_up, inner
    d_normed = gate_up.input_gradient(gradient, matrix)
    d_downs: list[Tensor | None] = [None, None]
    if gate_up.width:
        d_downs = gate_up.normed_down_gradients(ds, saved["middle"], saved["rstd_2"], layer.norm_2)
    del gradient, ds, matrix
    d_middle = layer.o.gradient_buffer(tokens, grad)
    out = d_middle[:, :width]
    codes = layer.o.gradient_codes(out)
    rms_norm_backward(d_normed, saved["middle"], layer.norm_2.weight, saved["rstd_2"], out, residual_grad=grad, **codes)
    return d_middle, codes, [*zip(d_downs, d_ups, strict=True), (d_down_down, d_up_down)]


def _down_backward(
    down: LinearGroup, saved: SavedTensors, grad: Tensor, gradient_buffer: GradientBuffer
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of SwiGLU's output, and for down_proj's adapter ds `[T, R]` and `d up`."""
    matrix = down.matrix(grad.dtype, grad.device)
    if not down.width:
        gradient, _ = down.gradient_input(grad, matrix)
        return down.input_gradient(gradient, matrix), None, None
    extended = gradient_buffer.take(grad, down.width)
    if extended is None:
        extended = down.extended(grad)
    (d_up,) = down.output_products(extended, saved["xa_down"], matrix)
    gradient, ds = down.gradient_input(extended, matrix)
    return down.input_gradient(gradient, matrix), ds.clone(), d_up


def _swiglu_backward(
    layer: LayerModules, saved: SavedTensors, d_hidden: Tensor, ds_down: Tensor | None, d_gate_up: Tensor
) -> tuple[list[Tensor | None], Tensor | None]:
    """Fill `d_gate_up [T, 2F]`; return `d up` of gate's and up's adapters and `d down` of down_proj's."""
    (gate_rank, up_rank), (down_rank,) = layer.gate_up.ranks, layer.down.ranks
    # beyond that the accumulators leave no registers, and separate products are faster
    if ds_down is not None and gate_rank and up_rank and max(gate_rank, up_rank, down_rank) <= 32:
        d_gate, d_up, d_down = swiglu_pair_gradients(
            d_hidden,
            saved["gate_up"],
            saved["xa_gate_up"],
            (0, gate_rank),
            (gate_rank, up_rank),
            ds_down,
            down_rank,
            d_gate_up,
            layer.gate_up.trials,
        )
        return [d_gate, d_up], d_down
    hidden = None if ds_down is None else d_hidden.new_empty(d_hidden.shape)
    swiglu_backward(d_hidden, saved["gate_up"], d_gate_up, hidden)
    d_ups: list[Tensor | None] = [None, None]
    if layer.gate_up.width:
        d_ups = layer.gate_up.up_gradients(d_gate_up, saved["xa_gate_up"])
    if ds_down is None or hidden is None:
        return d_ups, None
    (d_down,) = layer.down.down_gradients(ds_down, hidden)
    return d_ups, d_down
