"""The forward and backward pass of several trials' packed batches as one CUDA graph; see `cuda_graphs`.

The trials' static batches become rows of one (`join_static`), of one length, and the graph returns what the host then
needs for each trial: its loss, and its gradients as one vector, so that nothing is done for each parameter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsr_scale.fused.cuda_graphs import Batch, Shapes, StepGraphs, static_losses


def join_static(batches: Sequence[Batch], shapes: Shapes | None = None) -> Batch:
    """Return one batch of the static batches of n trials, a row each; made on the host, it is copied to a GPU once.

    Args:
        batches: What `static_batch` made of each trial's batch, all on one device.
        shapes: Of the batches before, of as many trials; None: there were none.

    Returns:
        `input_ids` and `position_ids` `[n, T]`, shorter rows continued by unsupervised documents of their own;
        `cu_seq_lens` `[documents + 1]`, counted over all rows, empty ones at the end, and `longest`; `supervised`,
        `targets` and `weights` `[n N]`, N of each row: the places that are supervised, among those of all rows.
    """
    rows, lengths = len(batches), [batch["input_ids"].shape[1] for batch in batches]
    longest, places = max(batch["longest"] for batch in batches), max(len(batch["supervised"]) for batch in batches)
    own = sum(len(batch["cu_seq_lens"]) - 1 for batch in batches)

    def documents(length: int) -> int:
        return own + sum(-(-(length - one) // longest) for one in lengths)

    length = max(lengths)
    number = documents(length)
    if number * longest != rows * length:  # else documents of one length: sequences
        length, number, places = (shapes or Shapes()).holding(length, documents, places)
    whole = {name: batches[0][name].new_zeros(rows, length) for name in ("input_ids", "position_ids")}
    # beyond its own a trial's first place, of no weight: no trial reads another's
    chosen = {name: batches[0][name].new_zeros(rows, places) for name in ("supervised", "targets", "weights")}
    bounds: list[Tensor] = []
    for row, (batch, of_own) in enumerate(zip(batches, lengths, strict=True)):
        count, of_row = len(batch["supervised"]), batch["cu_seq_lens"]
        for name, values in whole.items():
            values[row, :of_own] = batch[name][0]
        for name, values in chosen.items():
            values[row, :count] = batch[name]
        chosen["supervised"][row] += row * length
        bounds.append(of_row[:-1] + row * length)  # the end of a row is where the next begins
        if of_own < length:
            whole["position_ids"][row, of_own:] = torch.arange(length - of_own, device=of_row.device) % longest
            extra = torch.arange(of_own, length, longest, dtype=of_row.dtype, device=of_row.device)
            bounds.append(extra + row * length)
    end = rows * length
    bounds.append(bounds[0].new_full((number + 1 - sum(map(len, bounds)),), end))
    result: Batch = {**whole, **{name: values.view(-1) for name, values in chosen.items()}}
    return {**result, "cu_seq_lens": torch.cat(bounds), "longest": longest}


class JointGraphs(StepGraphs):
    """Losses and gradients of n trials at once; the graph is captured with the first batch of a shape.

    A graph is of these trials' parameters where they are in memory: for a trial that takes another's place, make this
    anew. Beside that it is captured again where `StepGraphs` says.
    """

    def __init__(self, model: Any, trials: Sequence[Sequence[nn.Parameter]], max_graphs: int = 8) -> None:
        """Take what the trials share.

        Args:
            model: The causal language model whose linears are `JointLinear`s of the trials, fused, in training, on a
                GPU.
            trials: The parameters that each trial trains, in the order in which it wants their gradients.
            max_graphs: The least recently used graph is dropped beyond so many.
        """
        super().__init__(model, max_graphs)
        self.sizes = [len(parameters) for parameters in trials]
        self.parameters = [parameter for parameters in trials for parameter in parameters]

    def replay(self, batch: Batch, divisor: Tensor | float) -> tuple[Tensor, list[Tensor]]:
        """Return the losses of the trials, `[n]`, and for each one vector of all its gradients.

        Each trial's vector is its parameters' gradients, flat, one after another; the next replay overwrites it.

        Args:
            batch: What `join_static` made, on the GPU, or on the CPU in pinned memory.
            divisor: What the summed losses are divided by, `[n]`, likewise.
        """
        return super().replay(batch, divisor)

    def _outputs(self, batch: Batch, divisor: Tensor) -> tuple[Tensor, list[Tensor]]:
        losses = static_losses(self.model, batch) / divisor
        gradients = iter(torch.autograd.grad(losses, self.parameters, torch.ones_like(losses)))
        vectors = [torch.cat([next(gradients).reshape(-1) for _ in range(size)]) for size in self.sizes]
        return losses.detach(), vectors
