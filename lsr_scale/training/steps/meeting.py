"""A trainer that shares its forward and backward passes with others of its process: it meets them in each step.

All else of a step is its own: rows, the loss's divisor, checks, clipping, the optimizer, the schedule, logs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from lsr_scale.training.callbacks.memory import max_forward_tokens
from lsr_scale.training.checkpoint.trained_state import base_optimizer
from lsr_scale.training.steps.flat_adamw import FlatAdamW, clip
from lsr_scale.training.steps.head_loss import at_least_one
from lsr_scale.training.steps.joint import Member

_Base: Any = Trainer


Meet = Callable[[Member], Tensor]


class MeetingSteps(_Base):
    """Joint training steps for a trainer; goes before `GraphSteps` among a class's bases. Off until `meet` is set.

    Attributes:
        meet: Takes part in a joint step, and returns the loss, a scalar.
    """

    meet: Meet | None = None
    _trained: list[torch.nn.Parameter]
    _most_tokens: int | None = None

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return the optimizer's class and options; AdamW's is `FlatAdamW`, equal in value."""
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        return FlatAdamW if self.meet is not None and kind is torch.optim.AdamW else kind, options

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.meet is not None:
            self._hooked = True  # `FiniteCheck`'s hooks on gradients: those of a joint step are zeroed after it
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._most_tokens = max_forward_tokens(cast(Trainer, self))
            model.train()  # all of it: PEFT puts adapters in training mode into a base that is not
            vars(model)["zero_grad"] = self._drop_joint_gradients  # the module's own walks over all modules
        return model, loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the model has its own `zero_grad` again then."""
        if self.meet is not None:  # nothing is in it yet, and garbage is collected by who starts and ends all trials
            self.accelerator.free_memory = lambda *objects: objects
        try:
            return super().train(*args, **kwargs)
        finally:
            vars(self.model).pop("zero_grad", None)

    def get_train_dataloader(self) -> Any:
        """Return the loader; batches stay on the host, where the joint step makes one of all trials' and copies it."""
        if self.meet is None:
            return super().get_train_dataloader()
        pins, self.args.dataloader_pin_memory = self.args.dataloader_pin_memory, False
        try:
            loader = super().get_train_dataloader()
        finally:
            self.args.dataloader_pin_memory = pins
        loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return a step's batches and the number of their tokens, on the host as they are."""
        where = device if self.meet is None else torch.device("cpu")
        return super().get_batch_samples(epoch_iterator, num_batches, where)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do a micro-batch: its loss is returned, its gradients are the parameters', or the optimizer's."""
        if self.meet is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        if num_items_in_batch is None:  # the mean of each batch, and of a step's batches
            supervised = inputs["head"]["known"]["supervised"]
            num_items_in_batch = supervised.numel() * self.current_gradient_accumulation_steps
        before = self._take_away()
        member = Member(model, inputs, at_least_one(num_items_in_batch), self._most_tokens)
        loss = self.meet(member)
        self._skip = self.is_skipped(loss, inputs)  # `FiniteCheck` then logs a loss of 0
        self._take_gradients(member, before, zeros=self._skip)
        self.count_tokens(inputs["head"])
        return loss

    def _vectors(self) -> FlatAdamW | None:
        """Return the optimizer where it holds gradients as vectors, of all of its groups or of some."""
        optimizer = base_optimizer(self)
        return optimizer if isinstance(optimizer, FlatAdamW) else None

    def _take_away(self) -> list[Tensor | None]:
        """Return what a step's earlier batches left in the parameters' `grad`, which is None then; [] for nothing."""
        gradients = [parameter.grad for parameter in self._trained]
        if all(gradient is None for gradient in gradients):
            return []
        for parameter in self._trained:
            parameter.grad = None
        return gradients

    def _take_gradients(self, member: Member, before: list[Tensor | None], zeros: bool) -> None:
        """Add a joint step's gradients, or zeros, to those of a step's earlier batches."""
        optimizer, accumulates = self._vectors(), self.current_gradient_accumulation_steps > 1
        flat, vector = optimizer if optimizer is not None and optimizer.is_flat else None, member.gradient
        if zeros:
            torch._foreach_zero_(_gradients(self._trained) if vector is None else [vector])
        if vector is not None and flat is not None:
            flat.give(vector, self._trained, accumulates)
        elif vector is not None:
            vector = vector.clone() if accumulates else vector
            parts = vector.split([parameter.numel() for parameter in self._trained])
            for parameter, part in zip(self._trained, parts, strict=True):
                parameter.grad = part.view(parameter.shape)
        if before:
            _add_gradients(self._trained, before)
        if optimizer is not None and (vector is None or flat is None or before):
            optimizer.gather()

    def _gradients(self) -> list[Tensor]:
        optimizer = self._vectors()
        return _gradients(self._trained) if optimizer is None else optimizer.gradients()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients as the trainer does, without a walk over all modules of the model."""
        if self.meet is None:
            return super()._clip_grad_norm(model)
        return clip(self._gradients(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients, which is measured here where nothing clips them."""
        if self.meet is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return clip(self._gradients(), None)

    def _drop_joint_gradients(self, set_to_none: bool = True) -> None:
        """Free the trained parameters' gradients."""
        del set_to_none
        optimizer = self._vectors()
        if optimizer is not None:
            optimizer.drop()
        for parameter in self._trained:
            parameter.grad = None


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _add_gradients(parameters: list[torch.nn.Parameter], gradients: list[Tensor | None]) -> None:
    """Add to the parameters' `grad`; a parameter may have none here, there, or in both."""
    pairs = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
    has_both = [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]
    for parameter, gradient in pairs:
        parameter.grad = gradient if parameter.grad is None else parameter.grad
    if has_both:
        torch._foreach_add_(*map(list, zip(*has_both, strict=True)))
