"""A gradient that is not finite under a loss that is: what overflows in a backward pass, without one that does."""

import math

import torch


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def make_infinite(patch, trainer_class, when):
    """Make gradients infinite in the training batches for which `when(trainer)` is true.

    Args:
        patch: pytest's monkeypatch, or what has its `setattr`.
        trainer_class: TRL's or transformers' trainer; its loss must not be computed fused.
        when: Told the trainer, before a batch's loss is computed.
    """
    compute = trainer_class.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        result = compute(self, model, inputs, *args, **kwargs)
        return InfiniteGradient.apply(result) if model.training and when(self) else result

    patch.setattr(trainer_class, "compute_loss", poisoned)
