"""DeepSpeed's ZeRO optimizer with all gradients of a group as one vector. Importing this imports DeepSpeed."""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, distributed


class FlatZeroOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO-1 that averages gradients by one all-reduce a group, and clips this process's share of them at once.

    How parameters, masters and the optimizer's state are sharded is DeepSpeed's. Of that are used, by group:
    `bit16_groups_flat`, all parameters as one vector, of which each is a view; `round_robin_bit16_groups`, the
    parameters in that order; `round_robin_bit16_padding`, the elements after each; `partition_size`, the elements of a
    process's share; `averaged_gradients`, what `step` takes it from.

    Attributes:
        max_norm: Of all gradients, of all processes, as one vector; 0 clips nothing.
        decide: Told that norm, the same on every process, before a step is taken.
    """

    max_norm: float
    decide: Callable[[Tensor], None]

    @classmethod
    def convert(cls, optimizer: Any, max_norm: float, decide: Callable[[Tensor], None]) -> None:
        """Turn the optimizer that an engine made into this one; an engine takes none that is made elsewhere."""
        optimizer.__class__ = cls
        optimizer.max_norm, optimizer.decide = max_norm, decide

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over all processes, in one call a group, and keep this process's share of them."""
        for index, parameters_flat in enumerate(self.bit16_groups_flat):
            group, size = self.real_dp_process_group[index], int(self.partition_size[index])
            parts = []
            parameters = self.round_robin_bit16_groups[index]
            for parameter, padding in zip(parameters, self.round_robin_bit16_padding[index], strict=True):
                gradient = self.get_gradient_for_reduction(parameter)
                zeros = parameters_flat.new_zeros
                parts.append(zeros(parameter.numel()) if gradient is None else gradient.reshape(-1))
                if padding:
                    parts.append(zeros(padding))
                parameter.grad = parameter.grad_accum = None
            parts.append(parameters_flat.new_zeros(len(parameters_flat) - sum(map(len, parts))))
            gradients = torch.cat(parts).div_(distributed.get_world_size(group))
            distributed.all_reduce(gradients, group=group)
            share = gradients.narrow(0, distributed.get_rank(group) * size, size)
            self.averaged_gradients[index] = GradPartitionBufferGroup([share], share)

    def step(self, closure: Any = None) -> None:
        """Clip the gradients and take a step."""
        shares = [group.flat_partition for group in self.averaged_gradients.values()]
        squared = torch.nn.utils.get_total_norm(shares, foreach=True).float().square()
        distributed.all_reduce(squared, group=self.dp_process_group)
        norm = squared.sqrt()
        if self.max_norm > 0:
            torch._foreach_mul_(shares, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.decide(norm)
        super().step(closure)
        self._global_grad_norm = norm

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Leave the parameters as they are, views of what was just gathered; DeepSpeed would make each anew."""
