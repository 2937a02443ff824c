"""A trainer whose steps replay CUDA graphs, where a batch has what they need (`fused.cuda_graphs`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from lsr_scale.errors import first_line
from lsr_scale.fused.cuda_graphs import Shapes, StepGraphs, describe_captures, static_batch
from lsr_scale.fused.joint_graphs import join_static
from lsr_scale.training.steps.head_loss import at_least_one

# What the host takes at least to launch a decoder layer's kernels, forward and backward, and what a GPU computes at
# best. Measured: 7 to 13 ms a layer (16 cores of a server, LSR-Adapt on seven linears); 650 TFLOP/s (H200).
HOST_S_PER_LAYER = 4e-3
# Of several trials at once. Measured: 5.9 ms a layer of Mistral-7B with two trials.
HOST_S_PER_LAYER_JOINT = 5.5e-3
GPU_FLOPS = 4e14
# In 8 bits there are more kernels, and they take less time. Measured: 17 to 20 ms a layer; 8.3 ms of Mistral-7B's layer
# for 8,192 tokens, 860 TFLOP/s with all else that a step computes.
HOST_S_PER_LAYER_8_BIT = 12e-3
GPU_FLOPS_8_BIT = 8e14

_Base: Any = Trainer


def host_bound(parameters: int, layers: int, tokens: int, eight_bit: bool = False, joint: bool = False) -> bool:
    """Tell whether a GPU computes a step's forward and backward pass faster than its host launches it.

    Args:
        parameters: Of the base; each costs 4 FLOP a token, as it is frozen.
        layers: Decoder layers.
        tokens: In a micro-batch.
        eight_bit: Whether the base's products are computed in 8 bits.
        joint: Whether the step is that of several trials, whose tokens these are.
    """
    flops, host = (GPU_FLOPS_8_BIT, HOST_S_PER_LAYER_8_BIT) if eight_bit else (GPU_FLOPS, HOST_S_PER_LAYER)
    host = HOST_S_PER_LAYER_JOINT if joint else host
    return 4 * parameters * tokens / flops < host * layers


class PackedCollator:
    """Adds to a batch of packed rows, as `static`, the same in a shape that repeats; goes around `HeadCollator`."""

    def __init__(self, collator: Callable[[Any], dict[str, Any]], longest: int, shapes: Shapes | None = None) -> None:
        """Take a collator, an upper bound on the length of a row in tokens, and the shapes of the batches before.

        Without shapes every batch has its own, as where several trials' are joined later.
        """
        self.collator, self.longest, self.shapes = collator, longest, shapes

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Return a batch."""
        batch = self.collator(examples)
        names = ("input_ids", "labels", "position_ids")
        static = static_batch(*(batch[name] for name in names), longest=self.longest)
        return {**batch, "static": static if self.shapes is None else join_static([static], self.shapes)}


class GraphSteps(_Base):
    """Training steps by graphs for a trainer; goes before `HeadLoss` among a class's bases. Off until `graphs` is set.

    The first two steps of a run are eager: what is decided after the first one (`training.memory: auto`) stays, and
    kernels are compiled.
    """

    graphs: StepGraphs | None = None
    say: Callable[[str], None] = staticmethod(lambda text: None)
    _first_graph_step: int | None = None
    _num_parameters: int | None = None
    _evaluates_without: bool = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the model has its own `zero_grad` again then, and the graphs' memory is free for evaluations."""
        try:
            return super().train(*args, **kwargs)
        finally:
            vars(self.model).pop("zero_grad", None)
            if self.graphs is not None:
                self.graphs.clear()
                if self.graphs.captures[0]:
                    self.say(describe_captures(*self.graphs.captures))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; where the memory does not hold that beside the graphs, this and later evaluations are without."""
        graphs = self.graphs if self.graphs is not None and self.graphs.captured else None
        if graphs is not None and not self._evaluates_without:
            try:
                return super().evaluation_loop(*args, **kwargs)
            except torch.OutOfMemoryError:
                self._evaluates_without = True
                self.say("evaluations need the memory of the CUDA graphs, which are captured anew after each")
        # not within the handler: until its end the error holds what the evaluation had allocated
        if graphs is not None:
            graphs.clear()
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does."""
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "static"}, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do a micro-batch: its loss is returned, its gradients are the parameters'."""
        inputs = dict(inputs)
        static = inputs.pop("static", None)
        if self._first_graph_step is None:
            self._first_graph_step = self.state.global_step + 2
        if self.graphs is None or static is None or self.state.global_step < self._first_graph_step:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        steps = self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            num_items_in_batch = static["weights"].sum() * steps
        replayed, reason = None, ""
        try:
            divisor = at_least_one(num_items_in_batch)
            replayed = self.graphs.replay(self._prepare_inputs(static), divisor)
        except RuntimeError as error:
            if self.graphs.captured and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = first_line(error)
        if replayed is None:
            # steps are eager from here on: nothing was replayed yet, or the memory does not hold another shape's graph.
            # Not within the handler: until its end the error holds what the capture had allocated.
            self.graphs = None
            vars(model).pop("zero_grad", None)
            self.say(f"CUDA graphs are off: {reason}")
            return super().training_step(model, inputs, num_items_in_batch)
        loss, gradients = replayed
        # the module's own walks over all modules after every step: 4 ms of the host's 20, for 135M parameters
        vars(model)["zero_grad"] = self._drop_gradients
        self._skip = self.is_skipped(loss, inputs)  # `FiniteCheck` then logs a loss of 0
        if self._skip:
            torch._foreach_zero_(gradients)
        self.graphs.add_to_grads(gradients, accumulates=steps > 1)
        self.count_tokens(inputs["head"])
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the trainer's estimate of a batch's operations; it counts the parameters anew for every batch."""
        if self._num_parameters is None:
            self._num_parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    def _drop_gradients(self, set_to_none: bool = True) -> None:
        """Free the trained parameters' gradients."""
        del set_to_none
        assert self.graphs is not None
        for parameter in self.graphs.parameters:
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients as the trainer does, without a walk over all modules of the model."""
        if self.graphs is None:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self.graphs.parameters, self.args.max_grad_norm)
