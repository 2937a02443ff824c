"""The forward and backward pass of a packed batch as CUDA graphs: for models that the GPU is faster on than its host.

Of a small model's step the GPU does the work in a fraction of the time that the host takes to launch its thousands of
kernels. A graph launches them at once. It needs shapes that repeat and no wait for the GPU, so a batch is brought to
one of few shapes on the host (`static_batch`), and what depends on its content stays tensors: boundaries of documents,
and the positions that are supervised. There is one graph a shape; they share their memory, for they run one at a time.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.fused.fallback import why_not_head
from lsr_scale.fused.loss import IGNORED, linear_cross_entropy

# tensors, and the number `longest`
Batch = dict[str, Any]


def rounded(number: int, parts: int) -> int:
    """Return the next number up that has only log2(parts) + 1 leading binary digits: `parts` sizes an octave."""
    step = 1 << max(0, (number - 1).bit_length() - parts.bit_length())
    return -(-number // step) * step


def static_batch(input_ids: Tensor, labels: Tensor, position_ids: Tensor, longest: int) -> Batch:
    """Return a packed batch in one of few shapes; what is added is documents of their own that nothing learns from.

    Args:
        input_ids: `[1, T]`, on the CPU like all of them: documents one after another.
        labels: `[1, T]`, `IGNORED` where nothing is to be learned and at the start of a document.
        position_ids: `[1, T]`, 0 where a document begins.
        longest: An upper bound on the documents' lengths, the same for all batches.

    Returns:
        `input_ids` and `position_ids` `[1, T']`; `cu_seq_lens` `[documents' + 1]`, int32, empty documents at the end,
        and `longest`, a number; `supervised` `[N']`, the positions that predict a label, with `targets` `[N']` and
        `weights` `[N']`, which are 1 and, beyond the first N, 0.
    """
    ids, wanted, positions = input_ids[0], labels[0], position_ids[0]
    length = len(ids)
    starts = (positions == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([length])])
    documents = bounds.diff()
    longest = max(longest, int(documents.max()))
    size = max(64, rounded(length, 8))
    added = size - length
    if not added and bool((documents == documents[0]).all()):
        longest = int(documents[0])  # rows of a batch
    else:
        extra = torch.arange(length, size, longest)
        # as many for all batches of this size and number of documents
        number = rounded(len(starts) + -(-max(64, size // 8) // longest), 4)
        bounds = torch.cat([starts, extra, extra.new_full((number + 1 - len(starts) - len(extra),), size)])
    supervised = (wanted[1:] != IGNORED).nonzero().flatten()
    targets = wanted[supervised + 1]
    more = max(16, rounded(len(supervised), 2)) - len(supervised)
    return {
        "input_ids": functional.pad(ids, (0, added))[None],
        "position_ids": torch.cat([positions, torch.arange(added) % longest])[None],
        "cu_seq_lens": bounds.to(torch.int32),
        "longest": longest,
        "supervised": torch.cat([supervised, torch.arange(more) % size]),
        "targets": functional.pad(targets, (0, more)),
        "weights": functional.pad(torch.ones(len(supervised)), (0, more)),
    }


def static_loss(head: Any, batch: Batch) -> Tensor:
    """Return a fused causal language model's summed cross-entropy over a batch that `static_batch` made.

    Args:
        head: The model (`LlamaForCausalLM` or the like), in training, its stack and layers fused.
        batch: On the model's device.
    """
    outputs = head.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seq_lens_q=batch["cu_seq_lens"],
        max_length_q=batch["longest"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state[0].index_select(0, batch["supervised"])
    weight = head.lm_head.weight
    return linear_cross_entropy(hidden.to(weight.dtype), weight, batch["targets"], batch["weights"])


@dataclass
class _Captured:
    """A graph, the tensors that it reads and those that it writes."""

    graph: Any
    batch: Batch
    divisor: Tensor
    loss: Tensor
    gradients: list[Tensor]


class StepGraphs:
    """Losses and gradients of batches of the same shapes by replaying what the first one of them did.

    Everything that Python decides is fixed when a shape is first seen. Graphs are made anew where parameters moved or
    layers were told to keep other things for the backward pass.
    """

    def __init__(self, head: Any, most: int = 24) -> None:
        """Take a fused causal language model on a GPU; the graphs of `most` shapes are kept."""
        self.head, self.most = head, most
        self.parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        self.layers: list[Any] = list(head.model.layers)
        self.captured: OrderedDict[Any, _Captured] = OrderedDict()
        self.state: Any = None
        self.pool: Any = None
        self.sums: list[Tensor] = []

    def replay(self, batch: Batch, divisor: Tensor | float) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of a batch, a scalar of its own, and its gradients, which the next replay overwrites.

        Args:
            batch: What `static_batch` made, on the GPU.
            divisor: What the summed loss is divided by.
        """
        state = [parameter.data_ptr() for parameter in self.parameters]
        state += [(layer.recompute, bool(layer.held)) for layer in self.layers]
        if state != self.state:
            self.captured.clear()
            self.state, self.pool = state, None
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        key = (batch["longest"], *(tensor.shape for tensor in tensors.values()))
        found = self.captured.get(key)
        if found is None:
            found = self._capture(batch)
            if len(self.captured) >= self.most:
                self.captured.popitem(last=False)
            self.captured[key] = found
        self.captured.move_to_end(key)
        for name, tensor in tensors.items():
            found.batch[name].copy_(tensor)
        found.divisor.copy_(divisor) if isinstance(divisor, Tensor) else found.divisor.fill_(divisor)
        found.graph.replay()
        return found.loss.clone(), found.gradients

    def give(self, gradients: list[Tensor], accumulates: bool = False) -> None:
        """Add gradients to the parameters'.

        Args:
            gradients: What `replay` returned.
            accumulates: Whether an optimizer's step has several batches. If not, they become the parameters' as they
                are, without a copy.
        """
        first = self.parameters[0].grad is None
        if accumulates:
            if not self.sums:
                self.sums = [torch.empty_like(gradient) for gradient in gradients]
            (torch._foreach_copy_ if first else torch._foreach_add_)(self.sums, gradients)
            gradients = self.sums
        if first:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def _capture(self, batch: Batch) -> _Captured:
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        by = torch.ones((), device=own["input_ids"].device)

        def run() -> tuple[Tensor, list[Tensor]]:
            loss = static_loss(self.head, own) / by
            return loss.detach(), list(torch.autograd.grad(loss, self.parameters))

        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # kernels are compiled and libraries loaded, which a capture may not do
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # a graph's memory is its own
        graph = torch.cuda.CUDAGraph()
        # other threads, such as one that pins batches, may do what a capture may not
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss, gradients = run()
        self.pool = graph.pool()
        return _Captured(graph, own, by, loss, gradients)


def why_not_graphs(head: Any, training: Mapping[str, Any]) -> str | None:
    """Return why the steps of a fused causal language model cannot be graphs, or None.

    Args:
        head: The model.
        training: `packing`, `padding_free`, `loss_type`, `label_smoothing_factor` of its trainer.
    """
    if not (training["packing"] or training["padding_free"]):
        return "batches are padded rows; set training.packing or training.padding_free"
    if training["loss_type"] != "nll" or training["label_smoothing_factor"]:
        return "the loss is not plain cross-entropy"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules()):
        return "the adapter has dropout"
    if not all(parameter.is_cuda for parameter in head.parameters()):
        return "the model is not on a GPU"
    return why_not_head(head, {})
