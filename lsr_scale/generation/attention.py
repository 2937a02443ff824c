"""The attention of decoding steps by `kernels.decode_attention`, in place of transformers' "sdpa" in the step's thread.

Transformers' own makes copies of keys and values for every query head that shares them, or computes one query as a
block of 64, and reads the whole memory whatever is in it. No configuration changes for it, which other threads would
read: a model that is called in two threads at once makes the masks that it needs in both.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lsr_scale.kernels.backend import use_triton
from lsr_scale.kernels.decode_attention import decode_attention

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
def attention_of_step(first: Tensor, place: Tensor) -> Iterator[None]:
    """Have the kernel compute "sdpa" attention in this thread's forward passes, which take one token a row.

    Args:
        first: `[B]`, where a row's tokens begin in the memory.
        place: `[1]`, where the new tokens are.
    """
    _register()
    token = _rows.set((first, place))
    try:
        yield
    finally:
        _rows.reset(token)


def _register() -> None:
    """Have transformers call this module for "sdpa"; once, unless somebody has put another function there since."""
    others = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not (isinstance(others, functools.partial) and others.func is attention_forward):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(attention_forward, others)


def attention_forward(
    others: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Do what transformers asks of an attention function: `[B, H, 1, D]` in, `[B, 1, H, D]` out.

    Args:
        others: The attention function of whatever is no decoding step.
        module: As for `others`; so what follows.
        query: `[B, H, S, D]`.
        key: `[B, KV, L, D]`.
        value: Like `key`.
        attention_mask: What `others` reads.
        scaling: Factor on the products.
        options: Whatever else there is.
    """
    # a compiled model has no step, and a trace no context
    rows = None if torch.compiler.is_compiling() else _rows.get()
    special = any(options.get(name) is not None for name in _OTHERS) or query.shape[2] != 1 or key.shape != value.shape
    if rows is None or special:
        return others(module, query, key, value, attention_mask, scaling=scaling, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query[:, :, 0].to(key.dtype), key, value, *rows, scale)[:, None], None
