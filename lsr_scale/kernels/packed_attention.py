"""Causal attention within short documents that are packed in a row, forward and backward.

    out[t, h] = sum_s softmax_s(scale q[t, h] k[s, g]) v[s, g],    start(t) <= s <= t,    g = h // (H / KV)

A kernel that takes documents one by one computes a whole tile for each, and starts as many programs for each as the
longest needs; for documents of 50 tokens nearly all of that is lost. Here tiles are of a row's tokens, whichever
documents they are of, and each reads the keys from the start of its first token's document on: about two tiles of keys.
For long documents FLASH's kernels are faster (`attention.choose_backend`).

Nothing is added up in an order that varies: gradients are the same from run to run. Tiles end where rows do, so what is
not finite in one row stays there.

Work: a token has about 96 keys and half a document: those of its own tile, and before them of whole tiles back to the
start of the first document. Each takes 4 H D FLOP in the forward pass, and 3.5 times that in the backward pass, which
computes the weights twice: once by queries for dq, once by keys for dk and dv.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import jit, tl, triton

LARGEST_HEAD = 128  # elements of a head: tiles of larger ones do not fit into every GPU's shared memory
_BLOCK = 64  # tokens of a tile
_LOG2_E = 1.4426950408889634


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Return the output in plain torch, in float32 or, for float64 tensors, in float64; differentiable.

    Args:
        q: `[B, S, H, D]`.
        k: `[B, S, KV, D]`, as v.
        v: What is summed.
        starts: int32 `[B, S]`, the first token of its row that each token sees.
        scale: Factor on the products.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    times = torch.arange(q.shape[1], device=q.device)
    seen = (times[:, None] >= times) & (times >= starts[:, :, None])
    scores = torch.einsum("bqkgd,bskd->bkgqs", grouped, k.to(wide)) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v.to(wide)).flatten(2, 3).to(q.dtype)


def bounds_reference(cu_seqlens: Tensor, rows: int, length: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Do what `document_bounds` does in plain torch."""
    places = torch.arange(rows * length, dtype=torch.int32, device=cu_seqlens.device)
    after = torch.searchsorted(cu_seqlens, places, right=True)
    row_starts = places // length * length
    starts, ends = cu_seqlens[after - 1] - row_starts, cu_seqlens[after.clamp(max=len(cu_seqlens) - 1)] - row_starts
    if window is not None and window < length:
        starts, ends = (
            torch.maximum(starts, places - row_starts - window + 1),
            torch.minimum(ends, places - row_starts + window),
        )
    return starts.view(rows, length), ends.view(rows, length)


@jit
def _bounds_kernel(cu_seqlens, starts, ends, tokens, length, num_bounds, steps, window, BLOCK: tl.constexpr):
    """Find each token's document by bisection."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tokens
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_bounds
    for _ in range(steps):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle, mask=inside & (middle < num_bounds), other=2147483647)
        is_before = begins <= places
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    row_start = places // length * length
    place = places - row_start
    start = tl.load(cu_seqlens + tl.maximum(low - 1, 0), mask=inside, other=0) - row_start
    end = tl.load(cu_seqlens + tl.minimum(low, num_bounds - 1), mask=inside, other=0) - row_start
    tl.store(starts + places, tl.maximum(tl.maximum(start, place - window + 1), 0), mask=inside)
    tl.store(ends + places, tl.minimum(tl.minimum(end, place + window), length), mask=inside)


@jit
def _forward_kernel(
    q,
    q_stride,
    q_head_stride,
    k,
    k_stride,
    k_head_stride,
    v,
    v_stride,
    v_head_stride,
    starts,
    out,
    statistics,
    scale_log2,
    length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend with a tile of queries of one head; `statistics [H, B S]` is log2 of what the weights are divided by."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(2).to(tl.int64) * length
    queries, columns = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_query, in_head = queries < length, columns < D
    inside = is_query[:, None] & in_head[None, :]
    places = row_start + queries
    query = tl.load(q + places[:, None] * q_stride + head * q_head_stride + columns[None, :], mask=inside, other=0.0)
    start = tl.load(starts + places, mask=is_query, other=length)
    k += row_start * k_stride + head // GROUP * k_head_stride
    v += row_start * v_stride + head // GROUP * v_head_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first = tl.load(starts + row_start + tile * BLOCK) // BLOCK * BLOCK
    for begin in range(first, tl.minimum((tile + 1) * BLOCK, length), BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        mask = (keys < length)[:, None] & in_head[None, :]
        key = tl.load(k + keys[:, None].to(tl.int64) * k_stride + columns[None, :], mask=mask, other=0.0)
        seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= start[:, None])
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        # a query may see nothing of the first tiles
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(largest - shift)
        weights = tl.exp2(scores - shift[:, None])
        value = tl.load(v + keys[:, None].to(tl.int64) * v_stride + columns[None, :], mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = higher
    num_heads = tl.num_programs(1)
    target = (places * num_heads + head) * D
    tl.store(out + target[:, None] + columns[None, :], (summed / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tokens = tl.num_programs(2).to(tl.int64) * length
    tl.store(statistics + head * tokens + places, largest + tl.log2(total), mask=is_query)


@jit
def _queries_backward_kernel(
    q,
    q_stride,
    q_head_stride,
    k,
    k_stride,
    k_head_stride,
    v,
    v_stride,
    v_head_stride,
    grad,
    grad_stride,
    grad_head_stride,
    out,
    statistics,
    starts,
    d_q,
    deltas,
    scale,
    scale_log2,
    length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dq of a tile of queries of one head, and `deltas [H, B S]`, the sums of out times its gradient."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(2).to(tl.int64) * length
    queries, columns = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_query, in_head = queries < length, columns < D
    inside = is_query[:, None] & in_head[None, :]
    places = row_start + queries
    tokens = tl.num_programs(2).to(tl.int64) * length
    target = ((places * tl.num_programs(1) + head) * D)[:, None] + columns[None, :]
    query = tl.load(q + places[:, None] * q_stride + head * q_head_stride + columns[None, :], mask=inside, other=0.0)
    d_out = tl.load(
        grad + places[:, None] * grad_stride + head * grad_head_stride + columns[None, :], mask=inside, other=0.0
    )
    delta = tl.sum(d_out.to(tl.float32) * tl.load(out + target, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(deltas + head * tokens + places, delta, mask=is_query)
    statistic = tl.load(statistics + head * tokens + places, mask=is_query, other=0.0)
    start = tl.load(starts + places, mask=is_query, other=length)
    k += row_start * k_stride + head // GROUP * k_head_stride
    v += row_start * v_stride + head // GROUP * v_head_stride
    summed = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first = tl.load(starts + row_start + tile * BLOCK) // BLOCK * BLOCK
    for begin in range(first, tl.minimum((tile + 1) * BLOCK, length), BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        mask = (keys < length)[:, None] & in_head[None, :]
        key = tl.load(k + keys[:, None].to(tl.int64) * k_stride + columns[None, :], mask=mask, other=0.0)
        value = tl.load(v + keys[:, None].to(tl.int64) * v_stride + columns[None, :], mask=mask, other=0.0)
        seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= start[:, None])
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        weights = tl.exp2(scores - statistic[:, None])
        d_weights = tl.dot(d_out, tl.trans(value), input_precision="ieee")
        d_scores = tl.where(seen, weights * (d_weights - delta[:, None]), 0.0)
        summed += tl.dot(d_scores.to(key.dtype), key, input_precision="ieee")
    tl.store(d_q + target, (summed * scale).to(d_q.dtype.element_ty), mask=inside)


@jit
def _keys_backward_kernel(
    q,
    q_stride,
    q_head_stride,
    k,
    k_stride,
    k_head_stride,
    v,
    v_stride,
    v_head_stride,
    grad,
    grad_stride,
    grad_head_stride,
    statistics,
    deltas,
    ends,
    d_k,
    d_v,
    scale,
    scale_log2,
    length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dk and dv of a tile of keys of one key/value head, over the query heads that read it."""
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_start = tl.program_id(2).to(tl.int64) * length
    keys, columns = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_key, in_head = keys < length, columns < D
    inside = is_key[:, None] & in_head[None, :]
    places = row_start + keys
    tokens = tl.num_programs(2).to(tl.int64) * length
    key = tl.load(k + places[:, None] * k_stride + kv_head * k_head_stride + columns[None, :], mask=inside, other=0.0)
    value = tl.load(v + places[:, None] * v_stride + kv_head * v_head_stride + columns[None, :], mask=inside, other=0.0)
    end = tl.load(ends + places, mask=is_key, other=0)
    last = tl.load(ends + row_start + tl.minimum((tile + 1) * BLOCK, length) - 1)
    key_sum = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for nth in range(GROUP):
        head = kv_head * GROUP + nth
        for begin in range(tile * BLOCK, last, BLOCK):
            queries = begin + tl.arange(0, BLOCK)
            is_query = queries < length
            mask = is_query[:, None] & in_head[None, :]
            rows = row_start + queries
            query = tl.load(
                q + rows[:, None] * q_stride + head * q_head_stride + columns[None, :], mask=mask, other=0.0
            )
            d_out = tl.load(
                grad + rows[:, None] * grad_stride + head * grad_head_stride + columns[None, :], mask=mask, other=0.0
            )
            statistic = tl.load(statistics + head * tokens + rows, mask=is_query, other=0.0)
            delta = tl.load(deltas + head * tokens + rows, mask=is_query, other=0.0)
            # [keys, queries]
            seen = (queries[None, :] >= keys[:, None]) & (queries[None, :] < end[:, None])
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
            weights = tl.where(seen, tl.exp2(scores - statistic[None, :]), 0.0)
            value_sum += tl.dot(weights.to(d_out.dtype), d_out, input_precision="ieee")
            d_weights = tl.dot(value, tl.trans(d_out), input_precision="ieee")
            d_scores = tl.where(seen, weights * (d_weights - delta[None, :]), 0.0)
            key_sum += tl.dot(d_scores.to(query.dtype), query, input_precision="ieee")
    target = ((places * tl.num_programs(1) + kv_head) * D)[:, None] + columns[None, :]
    tl.store(d_k + target, (key_sum * scale).to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + target, value_sum.to(d_v.dtype.element_ty), mask=inside)


def document_bounds(cu_seqlens: Tensor, rows: int, length: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first token that each token of a row sees, and the end of those that see it.

    Args:
        cu_seqlens: int32 `[documents + 1]`, starts and end of documents, counted over all rows; some may be empty.
        rows: B.
        length: S, tokens of a row.
        window: A token sees itself and the `window - 1` before it, at most.

    Returns:
        Two int32 `[B, S]`, counted within the row; neither ever falls along it.
    """
    starts = cu_seqlens.new_empty(rows, length)
    ends = torch.empty_like(starts)
    block, tokens, bounds = 256, rows * length, len(cu_seqlens)
    window = length if window is None else min(window, length)  # as long as a row it bounds nothing
    _bounds_kernel[(triton.cdiv(tokens, block),)](
        cu_seqlens, starts, ends, tokens, length, bounds, bounds.bit_length(), window, BLOCK=block
    )
    return starts, ends


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor `[B, S, heads, D]` as kernels take it, with the strides of a token and of a head."""
    assert x.stride(3) == 1
    x = x.flatten(0, 1)  # a copy where rows do not follow one another
    return x, x.stride(0), x.stride(1)


def _tiles(q: Tensor, k: Tensor) -> dict[str, int]:
    """Return how kernels are compiled for a model's heads."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "BLOCK": _BLOCK,
        "BLOCK_D": block_d,
        # tiles of large heads that are loaded ahead fit into no small GPU's shared memory
        "num_stages": 3 if block_d <= 64 else 1,
        "num_warps": 4,
    }


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the output `[B, S, H, D]`, contiguous, and what `packed_attention_backward` needs.

    Args:
        q: `[B, S, H, D]`, D at most `LARGEST_HEAD`, any strides with a unit last one.
        k: `[B, S, KV, D]`.
        v: `[B, S, KV, D]`.
        cu_seqlens: int32 `[documents + 1]`, starts and end of documents, counted over all rows; none crosses from one
            row to the next.
        scale: Factor on the products.
        window: A token attends to itself and the `window - 1` before it.
    """
    batch, length, heads, width = q.shape
    assert width <= LARGEST_HEAD
    assert k.shape == v.shape == (batch, length, k.shape[2], width)
    assert heads % k.shape[2] == 0
    starts, ends = document_bounds(cu_seqlens, batch, length, window)
    out = q.new_empty(q.shape)
    statistics = q.new_empty(heads, batch * length, dtype=torch.float32)
    grid = triton.cdiv(length, _BLOCK), heads, batch
    _forward_kernel[grid](
        *_strides(q), *_strides(k), *_strides(v), starts, out, statistics, scale * _LOG2_E, length, **_tiles(q, k)
    )
    return out, (statistics, starts, ends)


def packed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the arguments are those of `packed_attention`, and what it returned."""
    batch, length, heads, _ = q.shape
    statistics, starts, ends = saved
    assert out.is_contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    deltas = torch.empty_like(statistics)
    inputs = *_strides(q), *_strides(k), *_strides(v), *_strides(grad)
    scales = scale, scale * _LOG2_E, length
    tiles = triton.cdiv(length, _BLOCK)
    _queries_backward_kernel[(tiles, heads, batch)](
        *inputs, out, statistics, starts, d_q, deltas, *scales, **_tiles(q, k)
    )
    _keys_backward_kernel[(tiles, k.shape[2], batch)](
        *inputs, statistics, deltas, ends, d_k, d_v, *scales, **_tiles(q, k)
    )
    return d_q, d_k, d_v
