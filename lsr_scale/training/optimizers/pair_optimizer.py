"""What optimizers of pairs have in common.

A step of theirs moves the pair (down, up) of an update `scaling * up @ down`. LoRA's factors are the pair. Those of
LSR-Adapt and Kron-LoRA make it as sums of Kronecker products: their gradients give the pair's, as far as they can
follow it, and a step of the pair gives theirs (`kron_side`). So the state is that of the pair, and no step depends on
how its factors share one function.

All modules are stepped at once, since a GPU's host has as much to do for a small operation as for a large one: factors
are views of one vector (`FlatAdamW`), sides of one shape are one stack (`sides`), and so is the state, from step to
step. What the optimizer's `state` holds of each pair, under its first factor, are views of those stacks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from lsr_scale.adapters.pairs import Adapter
from lsr_scale.errors import UserError
from lsr_scale.training.optimizers.sides import Pair, Sides
from lsr_scale.training.optimizers.stacks import Stacks, State, Step
from lsr_scale.training.steps.flat_adamw import FlatAdamW, Vector


class PairOptimizer(FlatAdamW, ABC):
    """An optimizer whose first group are the factors of pairs; parameters of other groups are AdamW's.

    The state of a pair is that of its first factor, in the factors' dtype (float32), so that checkpoints hold it as
    they do any optimizer's.

    Attributes:
        pairwise: Whether groups of sides are of pairs that are alike, downs and ups apart.
    """

    pairwise = False

    def __init__(
        self,
        adapters: Sequence[Adapter],
        others: Iterable[Mapping[str, Any]] = (),
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take the adapters and all else that is trained.

        Args:
            adapters: One a module, of methods that have `kron_sides`.
            others: Parameter groups of AdamW.
            lr: Learning rate.
            betas: Decay of the first and second moments.
            eps: Added to the roots of second moments.
            weight_decay: Of all factors, decoupled.

        Raises:
            UserError: for an adapter whose sides are no sums of Kronecker products.
        """
        self.pairs: list[Pair] = []
        sizes: dict[Any, dict[str, tuple[int, int]]] = {}
        for adapter in adapters:
            pair = Pair.of(adapter, sizes)
            if pair is None:
                raise UserError(
                    f"training.optim: {type(self).__name__} is of pairs that are LoRA's or made of Kronecker products, "
                    f"and {adapter.method.name} with these options has none; set training.optim: adamw_torch_fused"
                )
            self.pairs.append(pair)
        self._stacks: dict[Any, Stacks] = {}  # by the device and the pairs that are on it
        self._addresses: list[int] = []  # of the factors in their vector
        self._absent: frozenset[int] = frozenset()  # pairs that the gathered gradient is not of
        parameters = [factor for pair in self.pairs for factor in pair.factors.values()]
        super().__init__(
            [{"params": parameters, "weight_decay": weight_decay}, *map(dict, others)],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    @abstractmethod
    def begin(self, sides: Sides, states: Mapping[int, State], like: Tensor) -> Any:
        """See `stacks.Steps`."""

    @abstractmethod
    def row_steps(self, step: Step, state: Any) -> list[Tensor]:
        """See `stacks.Steps`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step. Modules without a gradient are passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_pairs()
        groups = self.param_groups
        if any(parameter.grad is not None for group in groups[1:] for parameter in group["params"]):
            self.param_groups = groups[1:]
            try:
                super().step()
            finally:
                self.param_groups = groups
        return loss

    def give(self, *args: Any, **kwargs: Any) -> None:
        """Take the gradients of all parameters as one vector; see `FlatAdamW`."""
        super().give(*args, **kwargs)
        self._absent = frozenset()

    def factors_vector(self) -> Tensor | None:
        """Return all factors as one vector, of which they are views, None where they cannot be."""
        vector = self._vector_of_pairs()
        return None if vector is None else vector.data

    def _flatten(self, group: dict[str, Any]) -> Vector | None:
        if group is not self.param_groups[0]:
            return None
        vector = super()._flatten(group)
        self._addresses = [parameter.data_ptr() for parameter in group["params"]]
        return vector

    def _load_vector(self, vector: Vector) -> None:
        """Leave what was loaded as it is: the next step stacks it."""

    def _gradient_of(self, vector: Vector) -> Tensor | None:
        """Return the vector of the parameters' `grad`, zeros where a pair has none; None where no pair has."""
        gradients: list[Any] = [parameter.grad for parameter in vector.parameters]
        absent: frozenset[int] = frozenset()
        if any(gradient is None for gradient in gradients):
            absent = self._without_gradient()
            if len(absent) == len(self.pairs):
                return None
            zeros = zip(vector.parameters, gradients, strict=True)
            gradients = [torch.zeros_like(one) if gradient is None else gradient for one, gradient in zeros]
        self._absent = absent if vector.gradient is None else self._absent & absent
        return _flatten_dense_tensors(gradients)

    def _without_gradient(self) -> frozenset[int]:
        """Return the pairs of which a factor has no gradient."""
        return frozenset(
            number
            for number, pair in enumerate(self.pairs)
            if any(factor.grad is None for factor in pair.factors.values())
        )

    def _vector_of_pairs(self) -> Vector | None:
        """Return the vector of all factors, made anew where something gave them other data, such as another device."""
        parameters = self.param_groups[0]["params"]
        if not parameters:
            return None
        vector = self._vectors.get(id(parameters[0]))
        if [parameter.data_ptr() for parameter in parameters] == self._addresses:
            return vector
        gradient = None
        if vector is not None:
            gradient = vector.gradient
            del self._vectors[id(parameters[0])]
        made = self._flatten(self.param_groups[0])
        if made is not None:
            made.gradient = gradient
        elif vector is not None and gradient is not None:
            for parameter, part in zip(parameters, vector.views(gradient), strict=True):
                parameter.grad = part.to(parameter)
        return made

    def _step_pairs(self) -> None:
        vector = self._vector_of_pairs()
        if vector is not None:
            gradient = self._whole_gradient(vector)
            if gradient is not None:
                self._step_numbers(range(len(self.pairs)), vector.data, gradient)
                torch.autograd.graph.increment_version(vector.parameters)
            return
        # factors of several dtypes or devices: vectors are made for this step
        by_device: dict[torch.device, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            by_device.setdefault(pair.first.device, []).append(number)
        self._absent = self._without_gradient()
        for numbers in by_device.values():
            if self._absent.issuperset(numbers):
                continue
            parameters = [factor for number in numbers for factor in self.pairs[number].factors.values()]
            grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
            data, gradient = (torch.cat([one.detach().reshape(-1) for one in of]) for of in (parameters, grads))
            self._step_numbers(numbers, data, gradient)
            parts = data.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    def _step_numbers(self, numbers: Sequence[int], data: Tensor, gradient: Tensor) -> None:
        """Step the pairs of some numbers, whose factors are a vector one after another."""
        group, key = self.param_groups[0], (data.device, *numbers)
        if key not in self._stacks:  # on another device than before, their state goes along
            self._stacks = {of: stacks for of, stacks in self._stacks.items() if {*numbers}.isdisjoint(of[1:])}
            self._stacks[key] = Stacks({number: self.pairs[number] for number in numbers}, self)
        changes = self._stacks[key].changes(data, gradient, self._absent, self.state)
        if not changes:
            return
        factors, steps = zip(*changes, strict=True)
        if group["weight_decay"]:
            decayed = [data] if self._absent.isdisjoint(numbers) else list(factors)
            torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(factors, steps)


def bias_corrected(decay: float, step: int) -> float:
    """Return the decay of a moment's step (1 for the first) with which it needs no correction: `d (1-d^(t-1))/(1-d^t)`.

    An average with it is Adam's divided by `1 - decay^step`.
    """
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)
