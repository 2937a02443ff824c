"""From `training.optim` to an optimizer, for a trainer: those that transformers does not have."""

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

from lsr_scale import distributed
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.config import RunConfig
from lsr_scale.config.optimizers import OWN_OPTIMIZERS, optimizer_arguments
from lsr_scale.training.optimizers.lora_pro import LoraPro
from lsr_scale.training.optimizers.lora_rite import LoraRite

_Base: Any = Trainer
_OF_PAIRS = {"lora_rite": LoraRite, "lora_pro": LoraPro}


class OwnOptimizers(_Base):
    """A run's optimizer for a trainer; goes before it among a class's bases. Transformers' own where none is chosen.

    Attributes:
        chosen_optimizer: One of `OWN_OPTIMIZERS` and its arguments.
    """

    chosen_optimizer: tuple[str, dict[str, Any]] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's optimizer."""
        if self.chosen_optimizer is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        name, arguments = self.chosen_optimizer
        self.optimizer = self._of_pairs(_OF_PAIRS[name], arguments) if name in _OF_PAIRS else self._lora_plus(arguments)
        return self.optimizer

    def _lora_plus(self, arguments: dict[str, Any]) -> torch.optim.Optimizer:
        """Return PEFT's LoRA+ (arXiv 2402.12354): AdamW, up's rate a multiple of down's."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            lr=options.pop("lr"),
            loraplus_lr_ratio=arguments["lr_ratio"],
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _of_pairs(self, kind: Any, arguments: dict[str, Any]) -> torch.optim.Optimizer:
        model, settings = self.model, self.args
        active = [one for module in model.modules() for one in active_adapters(module)]
        adapters = [one for one in active if all(factor.requires_grad for factor in one.factors().values())]
        taken = {id(factor) for adapter in adapters for factor in adapter.factors().values()}
        decayed = set(self.get_decay_parameter_names(model))
        others: list[dict[str, Any]] = [
            {"params": [], "weight_decay": settings.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in taken:
                others[name not in decayed]["params"].append(parameter)
        optimizer = kind(
            adapters,
            [group for group in others if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            **arguments,
        )
        if distributed.world_size() > 1:
            optimizer.register_step_post_hook(_agree)
        return optimizer


def choose_optimizer(trainer: Any, run: RunConfig) -> None:
    """Have a trainer use a run's optimizer."""
    name = run.training["optim"]
    if name in OWN_OPTIMIZERS:
        assert isinstance(trainer, OwnOptimizers), f"{type(trainer).__name__}: OwnOptimizers is to be among its bases"
        trainer.chosen_optimizer = name, optimizer_arguments(name, run.training.get("optim_args"))


def _agree(optimizer: Any, *_: Any) -> None:
    """Give all processes the main one's factors: their decompositions may differ in the last digit."""
    vector = optimizer.factors_vector()
    if vector is not None:
        distributed.broadcast_tensor(vector)
        return
    for parameter in optimizer.param_groups[0]["params"]:
        distributed.broadcast_tensor(parameter.data)
