"""Cross-entropy of rows of logits and its gradient, in place: each logit is read twice and written once.

    loss_t = logsumexp(z_t) - z_t[label_t]
    z_t <- softmax(z_t) - onehot(label_t)          (the gradient of loss_t), if asked
    entropy_t = logsumexp(z_t) - sum_v softmax(z_t)_v z_t[v],  if asked

Float32 arithmetic whatever the dtype of the logits, one rounding of the gradient. Bytes per logit of a 16-bit dtype: 6,
of which 2 come from the cache for vocabularies of up to some hundred thousand; plain torch moves 28.
"""

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, tl, use_triton


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, *, gradient: bool, entropies: Tensor | None = None
) -> Tensor:
    """Compute `cross_entropy` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits.to(wide), dim=-1)
    losses = -log_probs.gather(1, labels[:, None])[:, 0]
    if entropies is not None:
        entropies.copy_(torch.special.entr(log_probs.exp()).sum(-1))
    if gradient:
        grad = log_probs.exp_()
        grad.scatter_add_(1, labels[:, None], grad.new_full((len(grad), 1), -1.0))
        logits.copy_(grad)
    return losses


@jit
def _cross_entropy_kernel(
    logits,
    labels,
    losses,
    entropies,
    vocabulary,
    row_stride,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    # online softmax: per lane the maximum logit so far, and the sum of exponentials relative to it
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    # and the sum weighted by the logits relative to it: their own size would cancel in the entropy
    weighted = tl.full((BLOCK,), 0.0, tl.float32)
    for step in range(STEPS):
        inside = step * BLOCK + columns < vocabulary
        z = tl.load(logits + step * BLOCK + columns, mask=inside, other=float("-inf")).to(tl.float32)
        running_max = tl.maximum(maximum, z)
        # a lane without logits so far keeps zero: -inf - -inf is NaN
        seen = running_max > float("-inf")
        before, now = tl.exp(maximum - running_max), tl.exp(z - running_max)
        if ENTROPY:
            shift = tl.where(maximum > float("-inf"), maximum - running_max, 0.0)
            mine = tl.where(z > float("-inf"), now * (z - running_max), 0.0)
            weighted = tl.where(seen, before * (weighted + shift * total) + mine, 0.0)
        total = tl.where(seen, total * before + now, 0.0)
        maximum = running_max
    top = tl.max(maximum, axis=0)
    whole = tl.sum(tl.where(maximum > float("-inf"), total * tl.exp(maximum - top), 0.0), axis=0)
    log_sum = top + tl.log(whole)
    if ENTROPY:
        shift = tl.where(maximum > float("-inf"), maximum - top, 0.0)
        weighted = tl.where(maximum > float("-inf"), tl.exp(maximum - top) * (weighted + shift * total), 0.0)
        tl.store(entropies + row, tl.log(whole) - tl.sum(weighted, axis=0) / whole)
    # a label outside the vocabulary gives NaN instead of a read out of bounds
    in_vocabulary = (label >= 0) & (label < vocabulary)
    tl.store(losses + row, log_sum - tl.load(logits + label, mask=in_vocabulary, other=float("nan")).to(tl.float32))
    if GRADIENT:
        # every thread has read its logits before one is overwritten
        tl.debug_barrier()
        for step in range(STEPS):
            inside = step * BLOCK + columns < vocabulary
            z = tl.load(logits + step * BLOCK + columns, mask=inside, other=float("-inf")).to(tl.float32)
            grad = tl.exp(z - log_sum) - tl.where(step * BLOCK + columns == label, 1.0, 0.0)
            tl.store(logits + step * BLOCK + columns, grad.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_triton(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient: bool,
    entropies: Tensor | None = None,
    block: int = 4096,
    num_warps: int = 8,
) -> Tensor:
    """Do what `cross_entropy` does, one program a row in steps of `block` logits."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _cross_entropy_kernel[(rows,)](
            logits,
            labels,
            losses,
            losses if entropies is None else entropies,
            vocabulary,
            logits.stride(0),
            GRADIENT=gradient,
            ENTROPY=entropies is not None,
            STEPS=-(-vocabulary // block),
            BLOCK=block,
            num_warps=num_warps,
        )
    return losses


def cross_entropy(logits: Tensor, labels: Tensor, *, gradient: bool, entropies: Tensor | None = None) -> Tensor:
    """Return each row's loss `[T]` (float32; float64 for such logits), and if asked write its gradient to `logits`.

    Args:
        logits: `[T, vocabulary]`, unit column stride.
        labels: `[T]`, int64, in `[0, vocabulary)`.
        gradient: Overwrite `logits` with the gradient of the row's loss.
        entropies: `[T]`, of the losses' dtype: written with the entropy of each row's softmax, in nats.
    """
    if is_fake(logits):
        return logits.new_empty(len(logits), dtype=torch.float32)
    run = cross_entropy_triton if use_triton(logits) else cross_entropy_reference
    return run(logits, labels, gradient=gradient, entropies=entropies)
