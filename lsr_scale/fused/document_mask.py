"""The attention mask of packed documents for a layer that runs unfused: it attends within documents, without a mask.

Transformers' layers hand their mask to `scaled_dot_product_attention`, which computes all `S^2` products of a row and
reads `[B, 1, S, S]`, however short the documents in it are. The mask here stands for that: given to
`scaled_dot_product_attention` it computes the same by `kernels.attention`, and to anything else it is the dense mask.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from lsr_scale.kernels.attention import Sequences, attention, attention_backward, choose_backend, dense_mask


class DocumentMask(Tensor):
    """A mask `[1, 1, 1, 1]` that stands for one `[B, 1, S, S]`; see the module.

    Attributes:
        sequences: The documents.
        rows: B.
        length: S.
    """

    sequences: Sequences
    rows: int
    length: int

    @classmethod
    def of(cls, sequences: Sequences, hidden: Tensor) -> "DocumentMask":
        """Return the mask for hidden states `[B, S, hidden]`."""
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=hidden.device).as_subclass(cls)
        mask.sequences, (mask.rows, mask.length) = sequences, hidden.shape[:2]
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Attend, or call a function with the dense mask in place of this one."""
        named: Any = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            out = _attended(*args, **named)
            if out is not None:
                return out
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _ALIKE:
                args, named = tree_map_only(DocumentMask, _dense, (args, named))
            return func(*args, **named)


# what this mask and the dense one have in common: the latter need not be made to tell it
_ALIKE: Any = (Tensor.dtype.__get__, Tensor.device.__get__)  # pyright: ignore[reportAttributeAccessIssue]


def _dense(mask: DocumentMask) -> Tensor:
    return dense_mask(mask.rows, mask.length, mask.sequences, mask.device)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Do what `scaled_dot_product_attention` does, `[B, H, S, D]`; None where it has to be done with a dense mask."""
    if not isinstance(attn_mask, DocumentMask) or dropout_p or not query.dtype == key.dtype == value.dtype:
        return None
    sequences = attn_mask.sequences.with_scale(float(query.shape[-1]) ** -0.5 if scale is None else scale)
    q, k, v = (_unit_stride(x.transpose(1, 2)) for x in (query, key, value))
    is_of_documents = q.shape[:2] == k.shape[:2] == (attn_mask.rows, attn_mask.length)
    if not is_of_documents or k.shape != v.shape or choose_backend(q, k, sequences) == "sdpa":
        return None
    out: Tensor = _Attention.apply(q, k, v, sequences)  # pyright: ignore
    return out.transpose(1, 2)


def _unit_stride(x: Tensor) -> Tensor:
    """Return a tensor as kernels take it: the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    """`kernels.attention` with its gradients, `[B, S, H, D]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        out, statistics = attention(q, k, v, sequences)
        ctx.sequences = sequences
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, *statistics = ctx.saved_tensors
        grad = _unit_stride(grads[0])
        return *attention_backward(grad, q, k, v, out, tuple(statistics), ctx.sequences), None
