"""A decoder layer of the LLaMA family as one autograd function, on a frozen base with low-rank pairs.

    n1 = rms_norm(x);        q, k, v = n1 [W_qkv + up down]^T;     q, k rotated
    m  = x + attention(q, k, v) [W_o + up down]^T
    n2 = rms_norm(m);        gate, up = n2 [W_gate_up + up down]^T
    y  = m + (silu(gate) * up) [W_down + up down]^T

Each bracket is one GEMM over a group's matrix (see `linear_groups`). Saved for the backward pass, per token: x, q k v,
the attention's output, m, gate and up (92 KB a layer on Mistral-7B; everything else is recomputed elementwise or is
tiny); with `recompute="mlp"` all but gate and up (36 KB); with `recompute="full"` x alone (8 KB), and then the backward
pass recomputes the layer up to gate and up: SwiGLU's output and the GEMM of down_proj are never needed twice. Matrices
dequantized for the recomputation serve the input gradients too.

No weight is saved for the backward pass, only the module, whose weights are read again there.

Groups of linears that compute in 8 bits (see `eight_bit_group`) do so in training alone: an evaluation is of the model
that is exported.
"""

from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsr_scale.adapters.pairs import Pair
from lsr_scale.fused import attention_block, mlp_block
from lsr_scale.fused.layer_state import LayerModules, LayerSizes, Positions, Recompute, SavedTensors, is_saved
from lsr_scale.kernels.fp8 import E4M3


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
            recompute: What the backward pass recomputes.
            pairs: down and up of each of `layer_linears(module)`, or None twice.
        """
        ctx.module, ctx.positions = module, positions
        ctx.eight_bit = dict(module.eight_bit) if module.training and x.dtype == torch.bfloat16 else {}
        layer = LayerModules(module, _paired(pairs), ctx.eight_bit)
        saved: SavedTensors = {"x": x.reshape(-1, x.shape[-1])}
        with torch.autocast(x.device.type, enabled=False):
            attention_block.forward(layer, saved, positions, {})
            mlp_block.gate_up_forward(layer, saved, {})
            y = mlp_block.down_forward(layer, saved)
        if module.sizes is None:
            module.sizes = _sizes(layer, saved, E4M3 if ctx.eight_bit else x.dtype)
        saved = {name: value for name, value in saved.items() if is_saved(name, recompute)}
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values(), *pairs)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x and of each pair (float32)."""
        (grad,) = grads
        tensors = ctx.saved_tensors
        saved: SavedTensors = dict(zip(ctx.names, tensors[: len(ctx.names)], strict=True))
        pairs = tensors[len(ctx.names) :]
        layer = LayerModules(ctx.module, _paired(pairs), ctx.eight_bit)
        matrices: dict[str, Any] = {}
        with torch.autocast(grad.device.type, enabled=False):
            if "qkv" not in saved:
                attention_block.forward(layer, saved, ctx.positions, matrices)
            if "gate_up" not in saved:
                mlp_block.gate_up_forward(layer, saved, matrices)
            d_y = grad.reshape(-1, grad.shape[-1])
            d_middle, codes, d_mlp = mlp_block.backward(layer, saved, matrices, d_y, ctx.positions.gradient_buffer)
            d_x, d_attention = attention_block.backward(
                layer, saved, ctx.positions, matrices, d_middle, codes, ctx.needs_input_grad[0]
            )
        flat = [part for pair in (*d_attention, *d_mlp) for part in pair]
        return d_x.view(grad.shape) if d_x is not None else None, None, None, None, *flat


def _sizes(layer: LayerModules, saved: SavedTensors, cached_dtype: torch.dtype) -> LayerSizes:
    """Return what a layer's forward pass made, and what its weights would take in a cache, in bytes."""
    x = saved["x"]
    by_level = {
        level: sum(value.nbytes for name, value in saved.items() if is_saved(name, level)) / max(1, len(x))
        for level in get_args(Recompute)
    }
    groups = layer.qkv, layer.o, layer.gate_up, layer.down
    cached = sum(group.cached_bytes(x.element_size()) for group in groups)
    return LayerSizes(by_level, cached, cached_dtype)


def _paired(flat: tuple[Tensor | None, ...]) -> list[Pair | None]:
    return [None if down is None or up is None else (down, up) for down, up in zip(flat[::2], flat[1::2], strict=True)]
