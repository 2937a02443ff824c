"""Attention of one new token a row to the row's keys and values in a cache of fixed size.

    out[b, h] = sum_t softmax_t(scale q[b, h] k[b, g, t]) v[b, g, t],    first[b] <= t <= place,    g = h // (H / KV)

Query heads that share a key/value head are computed together, so that the cache is read once, up to `place` and no
further, and nothing is repeated. Bytes: 2 B KV (place - first) D elements. Where rows are few, the tokens of a row are
shared out to several programs, and their sums are added up by `_combine_kernel` in a fixed order.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, multiprocessors, tl, triton, use_triton

# bytes of a block of keys
_BLOCK_BYTES = 16 * 1024
# programs that a multiprocessor is given, before the tokens of a row are shared out
_PROGRAMS = 4


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, place: Tensor, scale: float
) -> Tensor:
    """Do what `decode_attention` does in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    times = torch.arange(keys.shape[2], device=q.device)
    seen = ((times >= first[:, None]) & (times <= place))[:, None, None]
    scores = torch.einsum("bkgd,bktd->bkgt", grouped, keys.to(wide)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    # what is not seen may hold anything: zero times it need not be zero
    hidden = ~seen[:, :, 0, :, None]
    return torch.einsum("bkgt,bktd->bkgd", weights, values.to(wide).masked_fill(hidden, 0.0)).flatten(1, 2).to(q.dtype)


@jit
def _decode_kernel(
    q,
    q_row_stride,
    q_head_stride,
    keys,
    k_row_stride,
    k_head_stride,
    values,
    v_row_stride,
    v_head_stride,
    first,
    place,
    out,
    sums,
    scale,
    num_kv_heads,
    token_stride,
    num_splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Attend to a part of a row's tokens with the query heads of a key/value head.

    `out` is `[B, H, D]`, or with SPLIT float32 `[num_splits, B, H, D]` not divided by the weights' sum, with the parts'
    largest score and sum in `sums [num_splits, B, H, 2]`.
    """
    # 64 bits: rows times the cache's stride exceed 2^31
    row = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    heads = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    is_head, in_head = heads < GROUP, columns < D
    inside = is_head[:, None] & in_head[None, :]
    q += row * q_row_stride + (kv_head * GROUP + heads)[:, None] * q_head_stride + columns[None, :]
    query = tl.load(q, mask=inside, other=0.0)
    keys += row * k_row_stride + kv_head * k_head_stride
    values += row * v_row_stride + kv_head * v_head_stride
    begin = tl.load(first + row).to(tl.int32)
    end = tl.load(place).to(tl.int32) + 1
    # parts begin at whole blocks of the tokens that are seen
    blocks = tl.cdiv(end - begin, BLOCK_T)
    per_split = tl.cdiv(blocks, num_splits)
    start = begin + split * per_split * BLOCK_T
    stop = tl.minimum(start + per_split * BLOCK_T, end)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    summed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for time in range(start, stop, BLOCK_T):
        times = time + tl.arange(0, BLOCK_T)
        seen = times < stop
        offsets = times[:, None].to(tl.int64) * token_stride + columns[None, :]
        mask = seen[:, None] & in_head[None, :]
        key = tl.load(keys + offsets, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        weights = tl.exp(scores - higher[:, None])
        value = tl.load(values + offsets, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = higher
    target = row * num_kv_heads * GROUP + kv_head * GROUP + heads
    if not SPLIT:
        result = summed / total[:, None]
        tl.store(out + target[:, None] * D + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
    else:
        target += split.to(tl.int64) * (tl.num_programs(0) * GROUP)
        tl.store(out + target[:, None] * D + columns[None, :], summed, mask=inside)
        tl.store(sums + 2 * target, largest, mask=is_head)
        tl.store(sums + 2 * target + 1, total, mask=is_head)


@jit
def _combine_kernel(
    parts, sums, out, num_heads, num_splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add up the parts of a row's head: `out[b, h] = sum_s e^(m_s - m) part_s / sum_s e^(m_s - m) total_s`."""
    head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    places = head + splits.to(tl.int64) * num_heads
    is_split, in_head = splits < num_splits, columns < D
    largest = tl.load(sums + 2 * places, mask=is_split, other=float("-inf"))
    total = tl.load(sums + 2 * places + 1, mask=is_split, other=0.0)
    # a part without tokens has a largest score of -inf and sums of 0
    shrink = tl.exp(largest - tl.max(largest, 0))
    mask = is_split[:, None] & in_head[None, :]
    part = tl.load(parts + places[:, None] * D + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(part * shrink[:, None], 0) / tl.sum(total * shrink, 0)
    tl.store(out + head * D + columns, result.to(out.dtype.element_ty), mask=in_head)


def decode_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    place: Tensor,
    scale: float,
    *,
    splits: int | None = None,
    block_t: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """Launch the kernels; the arguments are `decode_attention`'s, then a row's parts, a block's tokens, and warps."""
    batch, heads, width = q.shape
    kv_heads, length = keys.shape[1:3]
    assert values.shape == keys.shape == (batch, kv_heads, length, width)
    assert heads % kv_heads == 0
    assert q.stride(2) == keys.stride(3) == values.stride(3) == 1
    assert keys.stride(2) == values.stride(2)
    assert first.shape == (batch,)
    block_d = max(16, triton.next_power_of_2(width))
    block_t = block_t or max(16, min(64, _BLOCK_BYTES // (block_d * keys.element_size())))
    if splits is None:
        most = triton.cdiv(_PROGRAMS * multiprocessors(q), batch * kv_heads)
        splits = max(1, min(most, triton.cdiv(length, 2 * block_t)))
    out = q.new_empty(batch, heads, width)
    parts, sums = out, out
    if splits > 1:
        parts = q.new_empty(splits, batch, heads, width, dtype=torch.float32)
        sums = q.new_empty(splits, batch, heads, 2, dtype=torch.float32)
    group = heads // kv_heads
    _decode_kernel[(batch * kv_heads, splits)](
        q,
        q.stride(0),
        q.stride(1),
        keys,
        keys.stride(0),
        keys.stride(1),
        values,
        values.stride(0),
        values.stride(1),
        first,
        place,
        parts,
        sums,
        scale,
        kv_heads,
        keys.stride(2),
        splits,
        GROUP=group,
        D=width,
        SPLIT=splits > 1,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_T=block_t,
        num_warps=num_warps,
    )
    if splits > 1:
        block_s = triton.next_power_of_2(splits)
        _combine_kernel[(batch * heads,)](
            parts, sums, out, batch * heads, splits, D=width, BLOCK_S=block_s, BLOCK_D=block_d
        )
    return out


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, place: Tensor, scale: float) -> Tensor:
    """Return what each row's new token attends to, `[B, H, D]`.

    Args:
        q: The new tokens' queries, `[B, H, D]`, any strides with a unit last one.
        keys: The cache, `[B, KV, L, D]`, with those of the new tokens; so `values`.
        values: What is summed.
        first: `[B]`, int64: where a row's tokens begin in the cache.
        place: `[1]`, int64: where the new tokens are; what lies behind is not read.
        scale: Factor on the products.
    """
    if is_fake(q):
        return q.new_empty(q.shape)
    run = decode_attention_triton if use_triton(q) else decode_attention_reference
    return run(q, keys, values, first, place, scale)
