"""The attention of decoding steps by `kernels.decode_attention`, under a name of its own in transformers' interface.

Transformers' own makes copies of keys and values for every query head that shares them, or computes one query as a
block of 64, and reads the whole memory whatever is in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lsr_scale.kernels.backend import use_triton
from lsr_scale.kernels.decode_attention import decode_attention

NAME = "lsr_scale_decode"
# what changes the scores or the sum, and is transformers' own's
_OTHERS = ("softcap", "s_aux", "position_bias", "cache")
# of the step that this thread runs: where its rows begin, and the place of the new tokens
_rows: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("rows of a decoding step", default=None)


def takes_kernel(base: Any, keys: Tensor) -> bool:
    """Tell whether the kernel computes the attention of a base's decoding steps: on a GPU, in place of PyTorch's.

    What PyTorch's does not compute either, such as scores that are capped, stays with the model's own ("eager").
    """
    asks = getattr(base, "_supports_attention_backend", False) and base.config._attn_implementation == "sdpa"
    return asks and use_triton(keys) and keys.shape[3] <= 256


@contextmanager
def attention_of_step(base: Any, first: Tensor, place: Tensor) -> Iterator[None]:
    """Have the kernel compute attention in this thread's forward passes of a base, which take one token a row.

    Args:
        base: The causal language model of transformers.
        first: `[B]`, where a row's tokens begin in the memory.
        place: `[1]`, where the new tokens are.
    """
    before, token = base.config._attn_implementation, _rows.set((first, place))
    base.config._attn_implementation = NAME
    try:
        yield
    finally:
        base.config._attn_implementation = before
        _rows.reset(token)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Do what transformers asks of an attention function: `[B, H, 1, D]` in, `[B, 1, H, D]` out."""
    rows = _rows.get()
    special = any(others.get(name) is not None for name in _OTHERS) or query.shape[2] != 1 or key.shape != value.shape
    if rows is None or special:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query[:, :, 0], key, value, *rows, scale)[:, None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
