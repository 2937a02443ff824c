"""Causal softmax attention, forward and backward as plain calls: a layer decides itself what it saves for the backward.

`out = softmax(scale q k^T + mask) v` per head, query head h reading key/value head h // (heads / kv_heads). Sequences
lie side by side in a batch, or packed one after another in rows with their boundaries (`cu_seqlens`). Short packed
ones have a kernel of their own (`packed_attention`); the others are PyTorch's: cuDNN's where it applies (on an H100 1.8
times the speed of the FLASH backend, both ways), else FLASH's, which also knows packed sequences and sliding windows;
masks, other dtypes and CPUs take `scaled_dot_product_attention`, never with cuDNN: its gradients under a mask are not
finite (`disable_cudnn_in_sdpa`). These operators are no stable API of PyTorch, so each is tested once against the
reference (`unavailable_reason`), and is not used, with a warning, where its results differ.

cuDNN's and FLASH's backward passes add in an order that varies from run to run;
`torch.use_deterministic_algorithms(True)` makes both deterministic, and slower.
"""

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.kernels.backend import has_triton, is_fake
from lsr_scale.kernels.packed_attention import LARGEST_HEAD, packed_attention, packed_attention_backward

logger = logging.getLogger(__name__)

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class SharedPrefixes:
    """Prefixes that documents share, whose tokens are there once: a document's queries are its last tokens.

    Attributes:
        places: int64 `[E]`, the tokens whose keys and values each document has, one document after another.
        cu_seqlens: int32 `[documents + 1]`, starts and end of the documents among those.
        max_seqlen: Length of the longest (an upper bound will do).
    """

    places: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def taken(self, x: Tensor) -> Tensor:
        """Return the keys or values `[E, H_kv, D]` of all documents, of `x [B, S, H_kv, D]`."""
        return x.flatten(0, 1).index_select(0, self.places)

    def added(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of `x` of that of what was taken: sums in float32."""
        total = grad.new_zeros(x.shape[:2].numel(), *x.shape[2:], dtype=torch.float32)
        return total.index_add_(0, self.places, grad.float()).to(x.dtype).view(x.shape)


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to which: causal within a sequence, restricted further by whatever is set.

    Attributes:
        scale: Factor on the logits.
        mask: Bool (True attends) or additive float mask that broadcasts to `[B, H, S, S]`, causality included.
        cu_seqlens: int32 `[documents + 1]`, starts and end of documents that are packed in the batch's rows, counted
            over all of these; none crosses from one row to the next.
        max_seqlen: Length of the longest document (an upper bound will do).
        window: A token attends to itself and the `window - 1` before it.
        shared: Prefixes that packed documents share; `cu_seqlens` are then those of their queries.
    """

    scale: float
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window: int | None = None
    shared: SharedPrefixes | None = None

    def with_scale(self, scale: float) -> "Sequences":
        """Return the same with another factor on the logits."""
        return replace(self, scale=scale)


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the attention's output and what its backward needs besides.

    Args:
        q: `[B, S, H, D]`, any strides with a unit last one.
        k: `[B, S, H_kv, D]`.
        v: `[B, S, H_kv, D]`.
        sequences: Which tokens attend to which.

    Returns:
        The output `[B, S, H, D]`, contiguous, and the statistics to save for the backward.
    """
    if is_fake(q):
        return q.new_empty(q.shape), (q.new_empty(q.shape[:-1], dtype=torch.float32),)
    backend = choose_backend(q, k, sequences)
    if backend == "sdpa":
        return attention_reference(q, k, v, sequences), ()
    return _forward(backend, q, k, v, sequences)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    sequences: Sequences,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    Args:
        grad: Gradient of the output, `[B, S, H, D]`.
        q: As in the forward pass.
        k: As in the forward pass.
        v: As in the forward pass.
        out: What `attention` returned.
        saved: The statistics that it returned.
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
    return _backward(backend, grad, q, k, v, out, saved, sequences)


def _forward(backend: str, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Do what `attention` does by one of the kernels."""
    scale = sequences.scale
    if backend == "packed":
        assert sequences.cu_seqlens is not None
        return packed_attention(q, k, v, sequences.cu_seqlens, scale, sequences.window)
    if backend == "cudnn":
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), (lse, seed, offset)
    packed = sequences.cu_seqlens is not None
    rows = [q.flatten(0, 1), *_keys(sequences, k, v)] if packed else [q, k, v]
    out, lse, seed, offset, _ = aten._flash_attention_forward(
        *rows, *_bounds(sequences, q), 0.0, True, False, scale=scale, **_flash_window(sequences)
    )
    return out.view(q.shape), (lse, seed, offset)


def _backward(
    backend: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    sequences: Sequences,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `attention_backward` does by the kernel that `_forward` used."""
    scale = sequences.scale
    if backend == "packed":
        statistics, starts, ends = saved
        return packed_attention_backward(grad, q, k, v, out, (statistics, starts, ends), scale)
    lse, seed, offset = saved
    if backend == "cudnn":
        heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        length = q.shape[1]
        d_q, d_k, d_v = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=scale
        )
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)
    packed = sequences.cu_seqlens is not None
    rows = [grad, q, k, v, out]
    if packed:
        rows = [grad.flatten(0, 1), q.flatten(0, 1), *_keys(sequences, k, v), out.flatten(0, 1)]
    d_q, d_k, d_v = aten._flash_attention_backward(
        *rows, lse, *_bounds(sequences, q), 0.0, True, seed, offset, scale=scale, **_flash_window(sequences)
    )
    if sequences.shared is not None:
        return d_q.view(q.shape), sequences.shared.added(d_k, k), sequences.shared.added(d_v, v)
    return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape)


def _keys(sequences: Sequences, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return keys and values of packed documents as FLASH reads them."""
    shared = sequences.shared
    return [x.flatten(0, 1) if shared is None else shared.taken(x) for x in (k, v)]


def _bounds(sequences: Sequences, q: Tensor) -> list[Any]:
    """Return where documents are among queries and among keys, and how long the longest are, in FLASH's order.

    Its last query is at its last key: causality is aligned there.
    """
    cu_seqlens, shared = sequences.cu_seqlens, sequences.shared
    longest = q.shape[1] if cu_seqlens is None else sequences.max_seqlen
    if shared is None:
        return [cu_seqlens, cu_seqlens, longest, longest]
    return [cu_seqlens, shared.cu_seqlens, longest, shared.max_seqlen]


@functools.cache
def _cudnn_was_enabled() -> bool:
    """Tell whether cuDNN's attention was enabled before `disable_cudnn_in_sdpa` disabled it: read once."""
    return torch.backends.cuda.cudnn_sdp_enabled()


def disable_cudnn_in_sdpa() -> None:
    """Disable cuDNN's backend of `scaled_dot_product_attention` in this process; it is called here, without a mask.

    Its backward pass under a mask gives NaN where logits are large, for rows padded to odd multiples of 64 (PyTorch
    2.11 with cuDNN 9.19 on H100 and H200), and PyTorch chooses it there by itself. For good, and not within a context:
    recomputed layers, Transformers' own layers, classifiers and generation all choose a backend whenever they run.
    """
    _cudnn_was_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Return the output by `scaled_dot_product_attention`: any device, any dtype, every kind of sequence."""
    mask = sequences.mask
    if sequences.cu_seqlens is not None or sequences.window is not None:
        assert mask is None, "mask excludes cu_seqlens and window"
        # for each row its own: what is not finite in one stays there
        mask = dense_mask(q.shape[0], q.shape[1], sequences, q.device)
    disable_cudnn_in_sdpa()
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


def dense_mask(batch: int, length: int, sequences: Sequences, device: torch.device) -> Tensor:
    """Return the bool mask `[B, 1, S, S]` of packed or windowed causal sequences, `[1, 1, S, S]` if rows have one."""
    if sequences.shared is not None:
        return _shared_mask(batch * length, sequences, sequences.shared).view(batch, 1, length, length)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0
    if sequences.window is not None:
        allowed &= distance < sequences.window
    if sequences.cu_seqlens is not None:
        places = torch.arange(batch * length, device=device)
        document = torch.searchsorted(sequences.cu_seqlens, places, right=True).view(batch, 1, length)
        allowed = allowed & (document.transpose(1, 2) == document)
    return allowed.view(-1, 1, length, length)


def _shared_mask(tokens: int, sequences: Sequences, shared: SharedPrefixes) -> Tensor:
    """Return the bool mask `[T, T]` of the tokens of one row, whose documents share prefixes."""
    bounds = sequences.cu_seqlens
    assert bounds is not None
    device = shared.places.device
    queries, keys = torch.arange(tokens, device=device), torch.arange(len(shared.places), device=device)
    of_query, of_key = (
        torch.searchsorted(cu, places, right=True) - 1 for cu, places in ((bounds, queries), (shared.cu_seqlens, keys))
    )
    # counted from the end of a document, where queries and keys are one token
    behind = (bounds[1:][of_query] - queries)[:, None] - (shared.cu_seqlens[1:][of_key] - keys)
    allowed = (of_query[:, None] == of_key) & (behind <= 0)
    if sequences.window is not None:
        allowed &= behind > -sequences.window
    return torch.zeros(tokens, tokens, device=device).index_add_(1, shared.places, allowed.float()) > 0


def _flash_window(sequences: Sequences) -> dict[str, Any]:
    if sequences.window is None:
        return {}
    return {"window_size_left": sequences.window - 1, "window_size_right": 0}


def choose_backend(q: Tensor, k: Tensor, sequences: Sequences) -> str:
    """Return "cudnn", "flash", "packed" or "sdpa": the fastest that can compute this; the same for the same shapes."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or sequences.mask is not None:
        return "sdpa"
    heads = q.device.index, q.dtype, q.shape[2], k.shape[2], q.shape[3]
    if _has_short_documents(q, sequences) and unavailable_reason("packed", *heads) is None:
        return "packed"
    plain = sequences.cu_seqlens is None and sequences.window is None
    if plain and unavailable_reason("cudnn", *heads) is None:
        return "cudnn"
    return "sdpa" if unavailable_reason("flash", *heads) else "flash"


# Tokens of a packed document on average, up to which the kernel for short ones is faster than FLASH's: measured on an
# H200 with heads of 64 and 128, where it still is at 400. Empty documents count too: how many is known on the GPU only.
_SHORT = 512


def _has_short_documents(q: Tensor, sequences: Sequences) -> bool:
    if sequences.cu_seqlens is None or sequences.shared is not None or q.shape[3] > LARGEST_HEAD:
        return False
    return q.shape[:2].numel() <= _SHORT * (len(sequences.cu_seqlens) - 1)


# relative to the reference's norm: bfloat16 makes 4 % at most, an argument of another meaning about 100 %
_MAX_RELATIVE_ERROR = 0.25


@functools.cache
def unavailable_reason(
    backend: str, device: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str | None:
    """Return why a kernel cannot be used for these heads on this GPU, or None: tested once."""
    if backend == "packed":
        if not has_triton:
            return "Triton is not installed"
    elif not (_cudnn_was_enabled() if backend == "cudnn" else torch.backends.cuda.flash_sdp_enabled()):
        return "it is disabled"
    reason = _self_test(backend, torch.device("cuda", device), dtype, heads, kv_heads, head_dim)
    if reason:
        kernel = "the kernel for short documents" if backend == "packed" else f"PyTorch's {backend} kernel"
        logger.warning("attention does not use %s: %s", kernel, reason)
    return reason


def _self_test(
    backend: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str | None:
    """Return why a kernel cannot be used, or None, by its output and gradients for a few tokens.

    No random numbers are drawn: a resumed run would draw others than one that was not stopped.
    """
    length, scale = 64, head_dim**-0.5
    sequences = Sequences(scale)
    if backend == "packed":
        ends = torch.tensor([0, 5, 37, length], dtype=torch.int32, device=device)
        sequences = Sequences(scale, cu_seqlens=ends, max_seqlen=length)
    with torch.inference_mode(False), torch.enable_grad():
        # waves of several lengths, so that no gradient is small beside what is summed for it
        q, k, v, grad = (
            torch.arange(length * n * head_dim, device=device).mul(0.37 + 0.21 * nth).sin().to(dtype)
            for nth, n in enumerate((heads, kv_heads, kv_heads, heads))
        )
        q, k, v, grad = (x.view(1, length, -1, head_dim) for x in (q, k, v, grad))
        inputs = [x.float().requires_grad_() for x in (q, k, v)]
        out = attention_reference(*inputs, sequences)
        expected = out.detach(), *torch.autograd.grad(out, inputs, grad.float())
    try:
        with torch.no_grad():
            out, saved = _forward(backend, q, k, v, sequences)
            actual = out, *_backward(backend, grad, q, k, v, out, saved, sequences)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except (AttributeError, TypeError, ValueError) as error:
        return f"PyTorch {torch.__version__} returns another form than expected ({error})"
    except Exception as error:  # Triton's: a GPU that it does not compile for, or with too little shared memory
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            return f"PyTorch {torch.__version__} returns shape {list(one.shape)}, expected {list(other.shape)}"
        relative_error = float((one.float() - other).norm() / other.norm())
        if not math.isfinite(relative_error):
            return f"its results in a self-test are not finite (PyTorch {torch.__version__})"
        if relative_error > _MAX_RELATIVE_ERROR:
            by = f"{relative_error:.0%} (PyTorch {torch.__version__})"
            return f"its results in a self-test differ from the reference by {by}"
    return None
