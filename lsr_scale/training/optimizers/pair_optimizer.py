"""What optimizers of pairs have in common.

A step of theirs moves the pair (down, up) of an update `scaling * up @ down`. LoRA's factors are the pair. Those of
LSR-Adapt and Kron-LoRA make it by `materialize`: their gradients give the pair's, as far as they can follow it, and a
step of the pair gives theirs (`kron_side`). So the state is that of the pair, and no step depends on how its factors
share one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsr_scale.adapters.pairs import Adapter, kind_of
from lsr_scale.adapters.peft import upcast
from lsr_scale.errors import UserError
from lsr_scale.training.optimizers.kron_side import Side, factor_steps, side_gradient

State = dict[str, Any]
SIDES = ("down", "up")


class PairOptimizer(torch.optim.AdamW, ABC):
    """An optimizer whose first group are the factors of pairs; parameters of other groups are AdamW's.

    Pairs of one shape are stepped as one stack. The state of a pair is that of its first factor, in the factors' dtype
    (float32), so that checkpoints hold it as they do any optimizer's.
    """

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
        self._kinds: list[list[tuple[Adapter, dict[str, Any]]]] = []
        kinds: dict[Any, list[tuple[Adapter, dict[str, Any]]]] = {}
        parameters: list[nn.Parameter] = []
        for adapter in adapters:
            factors: dict[str, Any] = adapter.factors()
            if not adapter.method.kron_sides(factors):
                raise UserError(
                    f"training.optim: {type(self).__name__} is of pairs that are LoRA's or made of Kronecker products, "
                    f"and {adapter.method.name} with these options has none; set training.optim: adamw_torch_fused"
                )
            kinds.setdefault((kind_of(adapter, factors), *(f.device for f in factors.values())), []).append(
                (adapter, factors)
            )
            parameters += factors.values()
        self._kinds = list(kinds.values())
        super().__init__(
            [{"params": parameters, "weight_decay": weight_decay}, *map(dict, others)],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    @abstractmethod
    def pair_steps(
        self, down: Tensor, up: Tensor, gradients: tuple[Tensor, Tensor], scaling: Tensor, states: list[State]
    ) -> tuple[Tensor, Tensor]:
        """Return what is taken off, times the rate, of n pairs, and bring their states up to date.

        Args:
            down: `[n, r, in]`.
            up: `[n, out, r]`.
            gradients: Of both, of a loss that sees `scaling * up @ down`.
            scaling: `[n, 1, 1]`.
            states: A dictionary each, with `step` alone at first, the number of this step.
        """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step. Modules without a gradient are passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind in self._kinds:
            present = [one for one in kind if all(factor.grad is not None for factor in one[1].values())]
            if present:
                self._step_stack(present)
        groups = self.param_groups
        if any(parameter.grad is not None for group in groups[1:] for parameter in group["params"]):
            self.param_groups = groups[1:]
            try:
                super().step()
            finally:
                self.param_groups = groups
        return loss

    def _step_stack(self, pairs: Sequence[tuple[Adapter, dict[str, Any]]]) -> None:
        """Step adapters of one method and one set of shapes."""
        group = self.param_groups[0]
        method = pairs[0][0].method
        factors = _stacked([named for _, named in pairs])
        grads = _stacked([{name: factor.grad for name, factor in named.items()} for _, named in pairs])
        down, up = method.materialize(factors)
        names = method.kron_sides(factors)
        sides = {side: _side(factors, names[side], pair) for side, pair in zip(SIDES, (down, up), strict=True)}
        gradient = []
        for side in SIDES:
            left, right = names[side]
            gradient.append(
                side_gradient(sides[side], None if left is None else terms(grads[left]), terms(grads[right]))
            )
        values = [adapter.scaling for adapter, _ in pairs]
        scaling = torch.tensor(values, dtype=down.dtype, device=down.device)[:, None, None]
        states = [self._state_of(named) for _, named in pairs]
        steps = self.pair_steps(down, up, (gradient[0], gradient[1]), scaling, states)
        changes: dict[str, Tensor] = {}
        for side, step in zip(SIDES, steps, strict=True):
            for name, change in zip(names[side], factor_steps(sides[side], step * group["lr"]), strict=True):
                if name is not None and change is not None:
                    changes[name] = change.reshape(factors[name].shape)
        for name, change in changes.items():
            parameters = [named[name].data for _, named in pairs]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, [one.to(parameters[0].dtype) for one in change.unbind()])

    def _state_of(self, named: Mapping[str, nn.Parameter]) -> State:
        """Return a pair's state with its step counted."""
        state = self.state[next(iter(named.values()))]
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        return state


def bias_corrected(decay: float, step: int) -> float:
    """Return the decay of a moment's step (1 for the first) with which it needs no correction: `d (1-d^(t-1))/(1-d^t)`.

    An average with it is Adam's divided by `1 - decay^step`.
    """
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)


def terms(factor: Tensor) -> Tensor:
    """Return stacked factors `[n, S, ...]`: of one term, if they have none of their own."""
    return factor if factor.dim() == 4 else factor.unsqueeze(1)


def _stacked(named: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return upcast({name: torch.stack([one[name].detach() for one in named]) for name in named[0]})


def _side(factors: Mapping[str, Tensor], names: tuple[str | None, str], dense: Tensor) -> Side:
    left = None if names[0] is None else terms(factors[names[0]])
    return Side(left, terms(factors[names[1]]), (dense.shape[-2], dense.shape[-1]))
