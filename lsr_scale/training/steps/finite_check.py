"""A trainer that checks that its losses and gradients are finite, on a GPU without synchronizing with it."""

import math
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale.training.callbacks import signals
from lsr_scale.training.steps import nonfinite

_Base: Any = Trainer
_DELAY = 4  # numbers: two batches' losses, and a gradient's norm after each


class FiniteCheck(_Base):
    """Handles losses and gradients that are not finite (`training.on_nonfinite`); goes before a trainer's class.

    "stop" ends the run: on the CPU at once, on a GPU some batches later, when the number is computed and nobody waits
    for it; nothing is logged, saved or evaluated in between.

    "skip": a batch whose loss is not finite leaves zero gradients, for which the host does wait. It adds nothing to its
    step's gradient. The step's other batches, on all processes, keep the weight that they had beside it: the sum of
    their losses is divided by the tokens of all, as ever. So no process needs to know of another's bad batch,
    and a step of one process and of several is the same. Where the gradient of a step is not finite though its losses
    are, or nothing is left of it, the optimizer takes no step: by the norm of the whole gradient, so on all processes
    alike, and on a GPU without waiting where the optimizer can (`SkippingOptimizer`).
    """

    on_nonfinite = "stop"
    micro_step = 0  # of the step under way
    skipping: "SkippingOptimizer | None" = None
    _micro_step_of = -1
    _skip = _hooked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the event after each number's copy, the copy, and what to call if it is not finite; the oldest first
        self._unchecked: deque[tuple[Any, Tensor, Callable[[float], None]]] = deque()
        callbacks = self.callback_handler.callbacks
        # after those that decide what is due
        deciding = [n for n, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback | signals.StopOnSignal)]
        callbacks.insert(max(deciding, default=-1) + 1, _CheckBeforeUse(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, one that can skip steps with `on_nonfinite: skip`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.on_nonfinite == "skip" and (self.skipping is None or self.skipping.optimizer is not optimizer):
            self.skipping = SkippingOptimizer(optimizer)
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does, and check that it is finite."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._skip = self.is_skipped(loss.detach(), inputs)
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do a micro-batch; one whose loss is not finite leaves zero gradients, if it does not end the run."""
        step = self.state.global_step
        self.micro_step = self.micro_step + 1 if step == self._micro_step_of else 0
        self._micro_step_of = step
        self._skip = False  # the last batch's; a graph that is captured now would keep its zeros
        if self.on_nonfinite == "skip" and not self._hooked:
            self._hooked = True
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # before any engine sees the gradient, so that all ranks stay in step
                    parameter.register_hook(lambda gradient: torch.zeros_like(gradient) if self._skip else None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.zeros_like(loss) if self._skip else loss

    def is_skipped(self, loss: Tensor, inputs: dict[str, Any]) -> bool:
        """Tell whether a batch is skipped.

        Args:
            loss: Of the batch, a scalar without a graph.
            inputs: The batch; recorded if its loss is not finite.

        Raises:
            UserError: for this loss or a number before it, where that ends the run.
        """
        step, micro_step = self.state.global_step, self.micro_step

        def handle(value: float) -> None:
            nonfinite.handle_nonfinite_loss(self, value, inputs, step, micro_step)

        if self.on_nonfinite == "skip":
            value = float(loss)
            self.check()  # earlier numbers have arrived by now
            skipped = not math.isfinite(value)
            if skipped:
                handle(value)
            return skipped
        self._check_later(loss, handle)
        return False

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the step's gradient, which is checked; the one that is logged of a skipped step is 0."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            return None
        norm, step = torch.as_tensor(norm), self.state.global_step
        self._check_later(norm.detach(), lambda value: nonfinite.handle_nonfinite_gradient(self, value, step))
        if self.skipping is None:
            return norm
        if not self.is_deepspeed_enabled:  # its engine has taken the step by now, see `engine.patch_engine`
            self.skipping.decide(norm)
        return norm.where(norm.isfinite(), 0.0)

    def _check_later(self, number: Tensor, handle: Callable[[float], None]) -> None:
        """Check a scalar, at once on the CPU and `_DELAY` numbers later on a GPU; call `handle` if it is not finite."""
        ready, on_host = None, number
        if number.is_cuda:
            on_host = torch.empty((), dtype=number.dtype, pin_memory=True)
            on_host.copy_(number, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unchecked.append((ready, on_host, handle))
        self.check(after=_DELAY if number.is_cuda else 0)

    def check(self, after: int = 0) -> None:
        """Handle each number that is not finite among those of which `after` newer ones exist.

        Raises:
            UserError: where that ends the run.
        """
        while len(self._unchecked) > after:
            ready, on_host, handle = self._unchecked.popleft()
            if ready is not None:
                ready.synchronize()
            value = float(on_host)
            if not math.isfinite(value):
                handle(value)


class SkippingOptimizer:
    """Makes an optimizer skip the step of a gradient that is not finite or zero: nothing of it changes.

    torch's fused optimizers read a tensor `found_inf` on the device, so the host does not wait. For others it does.
    """

    def __init__(self, optimizer: Any) -> None:
        """Take the optimizer before a schedule or an engine wraps it."""
        self.optimizer = optimizer
        self.on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._skip_next = False
        if self.on_device:
            return
        step = optimizer.step

        def step_or_not(_: Any, *args: Any, **kwargs: Any) -> Any:
            return None if self._skip_next else step(*args, **kwargs)

        optimizer.step = types.MethodType(step_or_not, optimizer)  # a method, as schedules expect

    def decide(self, norm: Tensor) -> None:
        """Decide on the next step, by the norm of all processes' gradients as one vector."""
        skipped = ~norm.detach().isfinite() | (norm.detach() == 0)
        if self.on_device:
            self.optimizer.found_inf = skipped.float()
        else:
            self._skip_next = bool(skipped)


class _CheckBeforeUse(TrainerCallback):
    """Has a trainer check its last losses and gradients before anything is logged or saved of them."""

    def __init__(self, trainer: FiniteCheck) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise for what is not finite, or record it."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.check()

    on_epoch_end = on_step_end
