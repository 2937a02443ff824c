"""Attention within packed documents that `kernel_times.py` times: by the kernel for short ones, beside FLASH's."""

import itertools
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.kernel_cases import Buffers, Case, Sizes
from lsr_scale.kernels.attention import Sequences, attention, attention_backward
from lsr_scale.kernels.packed_attention import packed_attention, packed_attention_backward

# query heads, key/value heads, elements of a head; and tokens, in those of the other operations
MODELS = {"SmolLM2-135M": (9, 3, 64, 4), "Qwen2.5-0.5B": (14, 2, 64, 2), "Mistral-7B": (32, 8, 128, 1)}
MEANS = (16, 48, 100, 200, 400, 800, 1600)

aten: Any = torch.ops.aten


def bounds(tokens: int, mean: int) -> list[int]:
    """Return starts and end of documents whose lengths are drawn from an exponential distribution."""
    draw, found = random.Random(0), [0]
    while found[-1] < tokens:
        found.append(min(tokens, found[-1] + 1 + int(draw.expovariate(1 / mean))))
    return found


def documents(b: Buffers, s: Sizes) -> list[Case]:
    """Forward and backward pass in documents of a mean length."""
    return [
        _case(b, name, s.T * times, heads, kv_heads, size, mean)
        for name, (heads, kv_heads, size, times) in MODELS.items()
        for mean in MEANS
        if mean < s.T
    ]


def _case(b: Buffers, name: str, tokens: int, heads: int, kv_heads: int, size: int, mean: int) -> Case:
    places = bounds(tokens, mean)
    longest = max(after - before for before, after in itertools.pairwise(places))
    q, k, v, grad = (b.rand(tokens, n, size) for n in (heads, kv_heads, kv_heads, heads))
    cu_seqlens = torch.tensor(places, dtype=torch.int32, device=b.device)
    scale = size**-0.5

    def ours(i: int) -> tuple[Tensor, ...]:
        qkv, d_out = (q[i][None], k[i][None], v[i][None]), grad[i][None]
        if b.device != "cuda":
            sequences = Sequences(scale, None, cu_seqlens, longest)
            out, saved = attention(*qkv, sequences)
            return out, *attention_backward(d_out, *qkv, out, saved, sequences)
        out, statistics = packed_attention(*qkv, cu_seqlens, scale)
        return out, *packed_attention_backward(d_out, *qkv, out, statistics, scale)

    def flash(i: int) -> None:
        where = cu_seqlens, cu_seqlens, longest, longest, 0.0, True
        out, lse, seed, offset, _ = aten._flash_attention_forward(q[i], k[i], v[i], *where, False, scale=scale)
        aten._flash_attention_backward(grad[i], q[i], k[i], v[i], out, lse, *where, seed, offset, scale=scale)

    def exact() -> list[tuple[Tensor, Tensor]]:
        parts: list[list[Tensor]] = []
        for begin, end in itertools.pairwise(places):
            leaves = [x[0][begin:end].double().transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
            of_query, of_key, of_value = leaves
            out = functional.scaled_dot_product_attention(
                of_query, of_key, of_value, is_causal=True, scale=scale, enable_gqa=True
            )
            gradients = torch.autograd.grad(out, leaves, grad[0][begin:end].double().transpose(0, 1))
            parts.append([x.detach().transpose(0, 1) for x in (out, *gradients)])
        return [(one[0], torch.cat(other)) for one, other in zip(ours(0), zip(*parts, strict=True), strict=True)]

    case = Case(f"documents, both ways, {name}", f"{tokens}x{heads}/{kv_heads}x{size}, mean {mean}", ours, exact=exact)
    if b.device == "cuda":
        case.alternative, case.other = "FLASH", flash
    return case


GROUPS = {"documents": documents}
