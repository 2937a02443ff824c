"""The forward and backward pass of a packed batch as CUDA graphs, for steps that wait for the host to launch them.

The GPU does the work of a small model's step in a fraction of the time that the host takes to launch its thousands of
kernels; in 8 bits a 7B model's step, too, is done before it is launched. A graph launches them at once. It needs static
shapes and no synchronization, so a batch is padded to one of few shapes on the host (`static_batch`), and what depends
on its content stays in tensors: boundaries of documents, and the positions that are supervised. There is one graph per
shape; they share a memory pool, since one runs at a time, and so does the eager pass that goes before each capture: all
together they take the memory of one step.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.fused.fallback import lm_head_fallback_reason
from lsr_scale.fused.loss import IGNORE_INDEX, token_losses

# tensors, and the number `longest`
Batch = dict[str, Any]


def rounded(number: int, parts: int) -> int:
    """Return the next number up with only log2(parts) + 1 significant binary digits: `parts` sizes per power of two."""
    step = 1 << max(0, (number - 1).bit_length() - parts.bit_length())
    return -(-number // step) * step


class Shapes:
    """Sizes that a run's batches are padded to: few, as each is a graph, whose capture takes as long as many steps.

    Attributes:
        made: Those that batches had: tokens of a row, documents, supervised places of a row.
    """

    def __init__(self) -> None:
        self.made: list[tuple[int, int, int]] = []

    def holding(self, tokens: int, documents: Callable[[int], int], places: int) -> tuple[int, int, int]:
        """Return the sizes for a batch: the smallest of those before that hold it, with 1/7 more tokens at most.

        Others are its own, with as many documents and places as any before had: those that are empty or weigh nothing
        cost next to nothing, and so they grow no further soon.

        Args:
            tokens: Of its rows.
            documents: Returns how many it has in rows of so many tokens, with those that fill them up.
            places: Supervised ones of its rows.
        """
        held = [
            made
            for made in self.made
            if tokens <= made[0] <= tokens * 8 / 7 and documents(made[0]) <= made[1] and places <= made[2]
        ]
        if held:
            return min(held)
        number, most = rounded(documents(tokens), 1), [max(of) for of in zip(*self.made, strict=True)]
        found = (tokens, max(number, most[1]), max(places, most[2])) if most else (tokens, number, places)
        self.made.append(found)
        return found


def static_batch(input_ids: Tensor, labels: Tensor, position_ids: Tensor, longest: int) -> Batch:
    """Return a packed batch padded to one of few shapes; the padding is documents of its own, unsupervised.

    Args:
        input_ids: `[1, T]`, on the CPU like all of them: documents one after another.
        labels: `[1, T]`, `IGNORE_INDEX` where the loss ignores them and at the start of a document.
        position_ids: `[1, T]`, 0 where a document begins.
        longest: An upper bound on the documents' lengths, the same for all batches.

    Returns:
        `input_ids` and `position_ids` `[1, T']`; `cu_seq_lens` `[documents' + 1]`, int32, empty documents at the end,
        and `longest`, a number; `supervised` `[N']`, the positions that predict a label, with `targets` `[N']` and
        `weights` `[N']`, which are 1 and, beyond the first N, 0.
    """
    ids, label_ids, positions = input_ids[0], labels[0], position_ids[0]
    length = len(ids)
    starts = (positions == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([length])])
    documents = bounds.diff()
    longest = max(longest, int(documents.max()))
    size = max(64, rounded(length, 8))
    added = size - length
    if not added and bool((documents == documents[0]).all()):
        longest = int(documents[0])  # documents of one length: the sequences of a batch
    else:
        extra = torch.arange(length, size, longest)
        # the same number for all batches of this size and number of documents
        number = rounded(len(starts) + -(-max(64, size // 8) // longest), 4)
        bounds = torch.cat([starts, extra, extra.new_full((number + 1 - len(starts) - len(extra),), size)])
    supervised = (label_ids[1:] != IGNORE_INDEX).nonzero().flatten()
    targets = label_ids[supervised + 1]
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


def static_loss(model: Any, batch: Batch) -> Tensor:
    """Return a fused causal language model's summed cross-entropy over a batch that `static_batch` made.

    Args:
        model: The model (`LlamaForCausalLM` or the like), fused and in training.
        batch: On the model's device.
    """
    return static_losses(model, batch).sum()


def static_losses(model: Any, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of each of the n rows of a batch, `[n]`; see `static_loss`.

    The rows have as many of the batch's `supervised` positions each, in their order.
    """
    outputs = model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seq_lens_q=batch["cu_seq_lens"],
        max_length_q=batch["longest"],
        use_cache=False,
    )
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch["supervised"])
    weight = model.lm_head.weight
    losses = token_losses(hidden.to(weight.dtype), weight, batch["targets"]) * batch["weights"]
    return losses.view(len(batch["input_ids"]), -1).sum(1)


@dataclass
class _CapturedStep:
    """A graph, its static inputs and outputs."""

    graph: Any
    batch: Batch
    divisor: Tensor
    loss: Tensor
    gradients: list[Tensor]


class StepGraphs:
    """Losses and gradients of batches by replaying the graph that was captured with the first batch of their shape.

    Everything that Python decides is fixed at the capture. Graphs are captured again where parameters moved, or layers
    recompute, cache or compute in 8 bits other things than before.

    Attributes:
        captures: How many graphs were captured, and the seconds that this took with the eager pass before each.
    """

    def __init__(self, model: Any, max_graphs: int = 24) -> None:
        """Take a fused causal language model on a GPU; the least recently used graph is dropped beyond `max_graphs`."""
        self.model, self.max_graphs = model, max_graphs
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers: list[Any] = list(model.model.layers)
        self.captured: OrderedDict[Any, _CapturedStep] = OrderedDict()
        self.state: Any = None
        self.pool: Any = None
        self.stream: Any = None
        self.sums: list[Tensor] = []
        self.captures: tuple[int, float] = 0, 0.0

    def replay(self, batch: Batch, divisor: Tensor | float) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of a batch, a scalar of its own, and its gradients, which the next replay overwrites.

        Args:
            batch: What `static_batch` made, on the GPU.
            divisor: What the summed loss is divided by.
        """
        state = self._state()
        if state != self.state:
            self.clear()
            self.state = state
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        key = (batch["longest"], *(tensor.shape for tensor in tensors.values()))
        step = self.captured.get(key)
        if step is None:
            began = time.perf_counter()
            step = self._capture(batch, divisor)
            self.captures = self.captures[0] + 1, self.captures[1] + time.perf_counter() - began
            made = self._state()
            if made != self.state:
                # what the capture's pass made is kept for others to read; earlier graphs read what it replaced
                self.captured.clear()
                self.state = made
            if len(self.captured) >= self.max_graphs:
                self.captured.popitem(last=False)
            self.captured[key] = step
        self.captured.move_to_end(key)
        for name, tensor in tensors.items():
            step.batch[name].copy_(tensor, non_blocking=True)
        step.divisor.copy_(divisor, non_blocking=True) if isinstance(divisor, Tensor) else step.divisor.fill_(divisor)
        step.graph.replay()
        return step.loss.clone(), step.gradients

    def clear(self) -> None:
        """Drop all graphs, with the memory that they hold: the next batch of each shape is captured anew."""
        self.captured.clear()
        self.state = self.pool = None

    def add_to_grads(self, gradients: list[Tensor], accumulates: bool = False) -> None:
        """Add gradients to the parameters' `grad`.

        Args:
            gradients: What `replay` returned.
            accumulates: Whether an optimizer step has several batches. If not, they become `grad` themselves, without a
                copy.
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

    def _state(self) -> list[Any]:
        """Return what graphs hold for, beside the shapes of a batch."""
        state: list[Any] = [parameter.data_ptr() for parameter in self.parameters]
        for layer in self.layers:
            groups = [(name, group.captured()) for name, group in layer.eight_bit.items()]
            state.append((layer.recompute, bool(layer.weight_cache), groups))
        return state

    def _outputs(self, batch: Batch, divisor: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what `replay` returns: what a graph computes."""
        loss = static_loss(self.model, batch) / divisor
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters))

    def _capture(self, batch: Batch, like: Tensor | float) -> _CapturedStep:
        device = next(self.model.parameters()).device  # where nothing is trained too
        static = {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        shape = like.shape if isinstance(like, Tensor) else ()
        divisor = torch.ones(shape, device=device)
        # what is freed on a stream is used again on that stream only: one for all passes, and its libraries' memory
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.MemPool()
        torch.cuda.empty_cache()  # what eager steps left is of no use to a pool of its own
        self.stream.wait_stream(torch.cuda.current_stream())
        # Warm-up: kernels are compiled and libraries loaded, which must not happen during capture. It has the pool's
        # memory, as the graphs have when they run; a pool takes one thread's allocations, so backward has no other.
        this_thread = torch.autograd.set_multithreading_enabled(False)
        with this_thread, torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            self._outputs(static, divisor)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, options = torch.cuda.CUDAGraph(), {"pool": self.pool.id, "stream": self.stream}
        # thread_local: other threads, such as one that pins batches, may make calls that a capture must not
        with torch.cuda.graph(graph, **options, capture_error_mode="thread_local"):
            loss, gradients = self._outputs(static, divisor)
        return _CapturedStep(graph, static, divisor, loss, gradients)


def describe_captures(number: int, seconds: float) -> str:
    """Return a line on what capturing graphs took."""
    graphs = "1 CUDA graph was" if number == 1 else f"{number} CUDA graphs were"
    return f"{graphs} captured, one a shape of the batches, in {seconds:.1f} s"


def graphs_fallback_reason(model: Any, training: Mapping[str, Any]) -> str | None:
    """Return why the steps of a fused causal language model cannot be CUDA graphs, or None.

    Args:
        model: The model.
        training: `packing`, `padding_free`, `loss_type`, `label_smoothing_factor` of its trainer.
    """
    if not (training["packing"] or training["padding_free"]):
        return "batches are padded rows; set training.packing or training.padding_free"
    if training["loss_type"] != "nll" or training["label_smoothing_factor"]:
        return "the loss is not plain cross-entropy"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "the adapter has dropout"
    if not all(parameter.is_cuda for parameter in model.parameters()):
        return "the model is not on a GPU"
    return lm_head_fallback_reason(model, {})
