"""Causal softmax attention, forward and backward as plain calls, so that a layer decides itself what it keeps.

`out = softmax(scale q k^T + mask) v` per head, query head h reading key/value head h // (heads / kv_heads). Sequences
lie side by side in a batch, or packed one after another in one row with their boundaries (`cu_seqlens`). The kernels
are PyTorch's: cuDNN's where it applies (on an H100 1.8 times the speed of the FLASH backend, both ways), else FLASH's,
which also knows packed sequences and sliding windows; masks, other dtypes and CPUs take
`scaled_dot_product_attention`.

cuDNN's and FLASH's backward passes add in an order that varies from run to run;
`torch.use_deterministic_algorithms(True)` makes both deterministic, and slower.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.kernels.backend import is_fake

aten = torch.ops.aten


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to which: causal within a sequence, restricted further by whatever is set.

    Attributes:
        scale: Factor on the logits.
        mask: Bool (True attends) or additive float mask that broadcasts to `[B, H, S, S]`, causality included.
        cu_seqlens: int32 `[documents + 1]`, starts and end of the packed documents of a batch of one row.
        max_seqlen: Length of the longest document (an upper bound will do).
        window: A token attends to itself and the `window - 1` before it.
    """

    scale: float
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window: int | None = None


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the attention's output and what its backward needs besides.

    Args:
        q: `[B, S, H, D]`, any strides with a unit last one.
        k: `[B, S, H_kv, D]`.
        v: `[B, S, H_kv, D]`.
        sequences: Which tokens attend to which.

    Returns:
        The output `[B, S, H, D]`, contiguous, and the statistics to keep.
    """
    if is_fake(q):
        return q.new_empty(q.shape), (q.new_empty(q.shape[:-1], dtype=torch.float32),)
    backend = choose_backend(q, k, sequences)
    scale = sequences.scale
    if backend == "cudnn":
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), (lse, seed, offset)
    if backend == "flash":
        packed = sequences.cu_seqlens is not None
        rows = [x.flatten(0, 1) for x in (q, k, v)] if packed else [q, k, v]
        longest = sequences.max_seqlen if packed else q.shape[1]
        out, lse, seed, offset, _ = aten._flash_attention_forward(
            *rows, sequences.cu_seqlens, sequences.cu_seqlens, longest, longest, 0.0, True, False, scale=scale,
            **_flash_window(sequences),
        )  # fmt: skip
        return out.view(q.shape), (lse, seed, offset)
    return attention_reference(q, k, v, sequences), ()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    sequences: Sequences,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    Args:
        grad: Gradient of the output, `[B, S, H, D]`.
        q: As in the forward pass, as are k and v.
        k: See q.
        v: See q.
        out: What `attention` returned, as is `kept`.
        kept: See out.
        sequences: As in the forward pass.
    """
    if is_fake(q):
        # the kernels add up dq in float32, and k's and v's gradients per query head
        sums = [q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape), q.new_empty(q.shape)]
        del sums
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    backend = choose_backend(q, k, sequences)
    if backend == "sdpa":
        with torch.enable_grad():
            inputs = q, k, v = [x.detach().requires_grad_() for x in (q, k, v)]
            again = attention_reference(q, k, v, sequences)
        d_q, d_k, d_v = torch.autograd.grad(again, inputs, grad)
        return d_q, d_k, d_v
    lse, seed, offset = kept
    scale = sequences.scale
    if backend == "cudnn":
        heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        length = q.shape[1]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=scale
        )
        d_q, d_k, d_v = (x.transpose(1, 2) for x in grads)
        return d_q, d_k, d_v
    packed = sequences.cu_seqlens is not None
    rows = [x.flatten(0, 1) for x in (grad, q, k, v, out)] if packed else [grad, q, k, v, out]
    longest = sequences.max_seqlen if packed else q.shape[1]
    grads = aten._flash_attention_backward(
        *rows, lse, sequences.cu_seqlens, sequences.cu_seqlens, longest, longest, 0.0, True, seed, offset, scale=scale,
        **_flash_window(sequences),
    )  # fmt: skip
    d_q, d_k, d_v = (x.view(like.shape) for x, like in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v


def attention_reference(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Return the output by `scaled_dot_product_attention`: any device, any dtype, every kind of sequence."""
    mask = sequences.mask
    if sequences.cu_seqlens is not None or sequences.window is not None:
        assert mask is None, "a mask says all there is to say"
        mask = dense_mask(q.shape[1], sequences, q.device)
    groups = q.shape[2] // k.shape[2]
    if mask is not None and groups > 1:
        # with a mask only the slow backends take grouped heads
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = functional.scaled_dot_product_attention(
        *heads_first,
        attn_mask=mask,
        is_causal=mask is None,
        scale=sequences.scale,
        enable_gqa=mask is None and groups > 1,
    )
    return out.transpose(1, 2).contiguous()


def dense_mask(length: int, sequences: Sequences, device: torch.device) -> Tensor:
    """Return the bool mask `[S, S]` of packed or windowed causal sequences."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0
    if sequences.window is not None:
        allowed &= distance < sequences.window
    if sequences.cu_seqlens is not None:
        document = torch.searchsorted(sequences.cu_seqlens, position, right=True)
        allowed &= document[:, None] == document[None, :]
    return allowed


def _flash_window(sequences: Sequences) -> dict[str, Any]:
    if sequences.window is None:
        return {}
    return {"window_size_left": sequences.window - 1, "window_size_right": 0}


def choose_backend(q: Tensor, k: Tensor, sequences: Sequences) -> str:
    """Return "cudnn", "flash" or "sdpa": the fastest that can compute this."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or sequences.mask is not None:
        return "sdpa"
    plain = sequences.cu_seqlens is None and sequences.window is None
    if plain and _works("cudnn", q.device.index, q.dtype, q.shape[2], k.shape[2], q.shape[3]):
        return "cudnn"
    if _works("flash", q.device.index, q.dtype, q.shape[2], k.shape[2], q.shape[3]):
        return "flash"
    return "sdpa"


@functools.cache
def _works(backend: str, device: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Try a backend once, forward and backward, on a few tokens of these heads: PyTorch builds and GPUs differ."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled if backend == "cudnn" else torch.backends.cuda.flash_sdp_enabled
    if not enabled():
        return False
    length = 64
    with torch.cuda.device(device), torch.no_grad():
        q, k, v = (torch.randn(1, length, n, head_dim, dtype=dtype, device="cuda") for n in (heads, kv_heads, kv_heads))
        try:
            if backend == "cudnn":
                heads_first = [x.transpose(1, 2) for x in (q, k, v)]
                out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
                    *heads_first, None, True, 0.0, True, False, scale=1.0
                )
                aten._scaled_dot_product_cudnn_attention_backward(
                    out, *heads_first, out, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=1.0
                )
            else:
                out, lse, seed, offset, _ = aten._flash_attention_forward(
                    q, k, v, None, None, length, length, 0.0, True, False, scale=1.0
                )
                aten._flash_attention_backward(
                    out, q, k, v, out, lse, None, None, length, length, 0.0, True, seed, offset, scale=1.0
                )
        except (RuntimeError, NotImplementedError):
            return False
    return True
