"""Linear cross-entropy of a language model's head, chunk by chunk: all logits are never in memory at once.

    loss = sum_t weight_t [logsumexp(h_t W^T) - (h_t W^T)_label(t)] / n      over supervised positions t

The gradient to h is computed in the forward pass, while a chunk's logits are there: `(softmax - onehot) W`, times
`weight / n` in the backward pass. The head is frozen. Logits are in the hidden states' dtype, softmax is computed
in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from lsr_scale.kernels.cross_entropy import cross_entropy

IGNORE_INDEX = -100  # torch's and transformers'
# 2,097 positions of a 32k vocabulary, 128 MB of logits in bfloat16
CHUNK_ELEMENTS = 2**26


# what is in float32 at once where a distribution is described
_DESCRIBED_ELEMENTS = 2**24


@dataclass
class Distributions:
    """Of each position's distribution over the vocabulary, without gradients: what trainers log.

    Attributes:
        entropy: `[T]`, in nats, float32.
        is_top1: `[T]`, whether the label is the most likely; None where nobody asks.
        mean_logits: `[T]`, the mean over the vocabulary, float32; None where nobody asks.
    """

    entropy: Tensor
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None

    @classmethod
    def empty(cls, hidden: Tensor, only_entropy: bool = False) -> "Distributions":
        """Return those of `hidden [T, ...]`, to be filled."""
        entropy = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if only_entropy:
            return cls(entropy)
        return cls(entropy, torch.empty_like(entropy, dtype=torch.bool), torch.empty_like(entropy))

    def fill(self, start: int, logits: Tensor, labels: Tensor) -> None:
        """Describe the rows from `start` on, by their logits `[t, vocabulary]` and labels `[t]`, but for entropies."""
        if self.mean_logits is None or self.is_top1 is None:
            return
        size = max(1, _DESCRIBED_ELEMENTS // logits.shape[1])
        for offset in range(0, len(logits), size):
            values = logits[offset : offset + size].float()
            part = slice(start + offset, start + offset + len(values))
            self.mean_logits[part] = values.mean(-1)
            self.is_top1[part] = values.argmax(-1) == labels[offset : offset + size]


class _TokenLosses(torch.autograd.Function):
    """`(h [T, hidden], W [vocabulary, hidden], labels [T]) -> the losses [T]`, float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, described: Distributions | None, temperature: float
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            if temperature != 1:
                logits /= temperature
            if described is not None:
                described.fill(start, logits, labels[part])
            entropies = None if described is None else described.entropy[part]
            losses[part] = cross_entropy(logits, labels[part], gradient=gradient is not None, entropies=entropies)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        if gradient is not None:
            if temperature != 1:
                gradient /= temperature
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None, None


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    described: Distributions | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the cross-entropy of each row of `hidden @ weight^T / temperature` against its label, float32, `[T]`.

    Differentiable in `hidden`; all logits are in memory only where the head is trained.

    Args:
        hidden: `[T, hidden]`.
        weight: `[vocabulary, hidden]`.
        labels: `[T]` in `[0, vocabulary)`, without ignored ones.
        described: Filled with what the distributions are like, if it is given.
        temperature: What logits are divided by.
    """
    if weight.requires_grad:
        logits = (hidden @ weight.t()).float() / temperature
        if described is not None:
            described.fill(0, logits.detach(), labels)
            described.entropy.copy_(torch.special.entr(logits.detach().softmax(-1)).sum(-1))
        return functional.cross_entropy(logits, labels, reduction="none")
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLosses.apply(hidden, weight, labels, described, temperature)  # pyright: ignore[reportReturnType]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of `token_losses`, weighted by `weights [T]` if they are given."""
    losses = token_losses(hidden, weight, labels)
    return (losses if weights is None else losses * weights).sum()


def causal_lm_loss(
    module: Any,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    supervised: Tensor | None = None,
    targets: Tensor | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Run a causal language model and return its mean loss over supervised positions; `logits` is None.

    Args:
        module: The transformers model.
        labels: `[B, S]`, -100 where the loss ignores them; shifted here, as transformers does.
        shift_labels: Labels that are shifted already; then `labels` is not used.
        num_items_in_batch: What the sum is divided by, if not by the number of supervised positions.
        supervised: `[N]`, the positions among the `B S` that predict a label, with `targets` `[N]`; if both are given,
            labels are not read, which would synchronize with the GPU.
        targets: See `supervised`.
        kwargs: Everything else, for the model under the head.
    """
    for name in ("logits_to_keep", "ignore_index", "return_dict"):
        kwargs.pop(name, None)
    outputs = module.model(**kwargs)
    hidden = outputs.last_hidden_state
    if supervised is None or targets is None:
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        targets = shift_labels.reshape(-1).to(hidden.device)
        supervised = (targets != IGNORE_INDEX).nonzero().flatten()
        targets = targets[supervised]
    chosen = hidden.reshape(-1, hidden.shape[-1])[supervised]
    loss = linear_cross_entropy(chosen.to(module.lm_head.weight.dtype), module.lm_head.weight, targets)
    divisor = max(len(supervised), 1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):
        divisor = divisor.to(loss.device)
    return CausalLMOutputWithPast(
        loss=loss / divisor, logits=None, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
