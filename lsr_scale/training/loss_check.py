"""A trainer that looks whether its losses are finite, on a GPU without waiting for them."""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale.training import faults

_Base: Any = Trainer


class LossCheck(_Base):
    """What a batch does whose loss is not finite (`training.on_nonfinite`); goes before a trainer among the bases.

    "stop" ends the run: on the CPU at once, on a GPU two batches later, when the loss is computed and nobody waits for
    it; nothing is logged, saved or evaluated in between. "skip" leaves zero gradients, for which the host does wait.

    A skipped micro-batch adds nothing to its step's gradient. The step's others, on this process and on the rest, weigh
    what they would have weighed beside it: the sum of their losses is divided by the tokens of all, as ever. So no
    process need hear of another's bad batch, and a step of one process and of several is the same.
    """

    on_nonfinite = "stop"
    micro_step = 0  # of the step under way
    _micro_step_of = -1
    _drop = _hooked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unchecked: deque = deque()
        callbacks = self.callback_handler.callbacks
        # after those that decide what is due
        deciding = [n for n, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback | faults.StopOnSignal)]
        callbacks.insert(max(deciding, default=-1) + 1, _CheckBeforeUse(self))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does, and see to it that it is finite."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._drop = self.is_dropped(loss.detach(), inputs)
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do a micro-batch; one whose loss is not finite leaves zero gradients, if it does not end the run."""
        step = self.state.global_step
        self.micro_step = self.micro_step + 1 if step == self._micro_step_of else 0
        self._micro_step_of = step
        if self.on_nonfinite == "skip" and not self._hooked:
            self._hooked = True
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # before any engine sees the gradient, so that all ranks stay in step
                    parameter.register_hook(lambda gradient: torch.zeros_like(gradient) if self._drop else None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.zeros_like(loss) if self._drop else loss

    def is_dropped(self, loss: Tensor, inputs: dict[str, Any]) -> bool:
        """Tell whether a batch shall count for nothing.

        Args:
            loss: Of the batch, a scalar without a graph.
            inputs: The batch; noted if its loss is not finite.

        Raises:
            UserError: for this loss or one before it, where that ends the run.
        """
        if self.on_nonfinite == "skip" or not loss.is_cuda:
            dropped = not bool(torch.isfinite(loss))
            if dropped:
                faults.on_nonfinite(self, float(loss), inputs)
            return dropped
        on_host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        on_host.copy_(loss, non_blocking=True)
        ready: Any = torch.cuda.Event()
        ready.record()
        self._unchecked.append((ready, on_host, inputs, self.state.global_step, self.micro_step))
        self.check_losses(after=2)
        return False

    def check_losses(self, after: int = 0) -> None:
        """Raise for a loss that is not finite among those of which `after` newer ones exist."""
        while len(self._unchecked) > after:
            ready, on_host, inputs, step, micro_step = self._unchecked.popleft()
            ready.synchronize()
            if not bool(torch.isfinite(on_host)):
                now = self.state.global_step
                self.state.global_step, self.micro_step = step, micro_step
                try:
                    faults.on_nonfinite(self, float(on_host), inputs)
                finally:
                    self.state.global_step = now


class _CheckBeforeUse(TrainerCallback):
    """Has a trainer look at its last losses before anything is logged or saved of them."""

    def __init__(self, trainer: LossCheck) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise for a loss that is not finite."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.check_losses()

    on_epoch_end = on_step_end
