"""A trainer whose steps under DeepSpeed cost the host little and never make it wait: a GPU is to have work meanwhile.

DeepSpeed is made for large parameters: it copies, reduces, measures and frees the gradient of each by itself, and reads
their norm in every step. An adapter has a thousand small ones, for which that takes a tenth of a 7B model's step. Here
they are joined, averaged and clipped at once, and nothing is read that is not logged.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Trainer

from lsr_scale.config import offloads_optimizer

_Base: Any = Trainer


class EngineSteps(_Base):
    """Steps by DeepSpeed for a trainer; goes before it among a class's bases. Without DeepSpeed it changes nothing."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with left_alone(self.accelerator.state.deepspeed_plugin.deepspeed_config):
            prepared = super()._prepare_for_training(*args, **kwargs)
        skipping = getattr(self, "skipping", None)
        ease(self.deepspeed, self.args.max_grad_norm, skipping.decide if skipping else lambda norm: None)
        return prepared

    def _clip_grad_norm(self, model: Any) -> Any:
        """Return the norm of the gradients, which the engine has clipped by now."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.get_global_grad_norm()  # not by `_get_grad_norm`, which the trainer calls once a step
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients; of an engine's as a tensor that nobody waited for."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.get_global_grad_norm()
        return super()._get_grad_norm(model, grad_norm)


@contextmanager
def left_alone(config: dict[str, Any]) -> Iterator[None]:
    """Tell an engine that is made here to leave gradients alone; `ease` sees to them.

    Args:
        config: As engines are told it; it is as before after this, since Trainer compares it with its arguments. One
            that holds the optimizer on the CPU is left as it is, for there gradients have a way of their own.
    """
    if offloads_optimizer(config):
        yield
        return
    clipping, zero = config.get("gradient_clipping"), config.get("zero_optimization", {})
    told = dict(zero)
    if zero.get("stage", 0) > 0:
        # stage 2 would hook every parameter; how gradients are shared out is the same in `_AtOnce`
        told |= {"stage": 1, "compute_grad_norm": False, "overlap_comm": False, "contiguous_gradients": False}
    config |= {"gradient_clipping": 0.0, "zero_optimization": told}
    try:
        yield
    finally:
        config |= {"gradient_clipping": clipping, "zero_optimization": zero}


def ease(engine: Any, max_norm: float, decide: Callable[[Tensor], None] = lambda norm: None) -> None:
    """Have DeepSpeed's engine reduce and clip gradients at once, if it was told to leave them alone.

    Args:
        engine: DeepSpeed's.
        max_norm: Of all gradients, of all processes, as one vector; 0 clips nothing.
        decide: Told that norm, the same on every process, before a step is taken.
    """
    optimizer, module = engine.optimizer, engine.module
    module.train()  # all of it: PEFT puts adapters in training mode into a base that is not
    # what walks over all modules of a model in every step
    engine.train = lambda mode=True: module.training == mode or module.train(mode)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine.zero_grad = lambda: [setattr(parameter, "grad", None) for parameter in trained]
    if engine.gradient_clipping() > 0 or isinstance(optimizer, _AtOnce):
        return
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0

        def clip(*_: Any) -> None:
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf, foreach=True)
            decide(engine._global_grad_norm)

        optimizer.register_step_pre_hook(clip)
    elif not getattr(optimizer, "compute_grad_norm", True):
        kind = type(optimizer)
        optimizer.max_norm, optimizer.decide = max_norm, decide
        optimizer.__class__ = type(f"AtOnce{kind.__name__}", (_AtOnce, kind), {})


class _AtOnce:
    """Goes before `DeepSpeedZeroOptimizer`, of stage 1, among a class's bases."""

    max_norm: float
    decide: Callable[[Tensor], None]
    bit16_groups_flat: Any  # by group: all parameters joined, as they are trained; each is a view of it
    round_robin_bit16_groups: Any  # by group: the parameters in that order
    round_robin_bit16_padding: Any  # by group: elements after each
    real_dp_process_group: Any
    partition_size: Any
    averaged_gradients: Any
    dp_process_group: Any
    get_gradient_for_reduction: Any

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over all processes, in one call a group, and keep this process's part of them."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        for index, flat in enumerate(self.bit16_groups_flat):
            group, size = self.real_dp_process_group[index], self.partition_size[index]
            pieces = []
            parameters = self.round_robin_bit16_groups[index]
            for parameter, padding in zip(parameters, self.round_robin_bit16_padding[index], strict=True):
                gradient = self.get_gradient_for_reduction(parameter)
                pieces.append(flat.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1))
                if padding:
                    pieces.append(flat.new_zeros(padding))
                parameter.grad = parameter.grad_accum = None
            pieces.append(flat.new_zeros(len(flat) - sum(map(len, pieces))))
            whole = torch.cat(pieces).div_(distributed.get_world_size(group))
            distributed.all_reduce(whole, group=group)
            part = whole.narrow(0, distributed.get_rank(group) * size, size)
            self.averaged_gradients[index] = GradPartitionBufferGroup([part], part)

    def step(self, closure: Any = None) -> None:
        """Clip the gradients and take a step."""
        parts = [group.flat_partition for group in self.averaged_gradients.values()]
        squared = torch.nn.utils.get_total_norm(parts, foreach=True).float().square()
        distributed.all_reduce(squared, group=self.dp_process_group)
        norm = squared.sqrt()
        if self.max_norm > 0:
            torch._foreach_mul_(parts, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.decide(norm)
        super().step(closure)  # pyright: ignore[reportAttributeAccessIssue]
        self._global_grad_norm = norm

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Leave the parameters as they are, views of what was just gathered; they would all be made anew."""
