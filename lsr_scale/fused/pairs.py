"""The pairs (down, up), LoRA's A and B, of many adapted linears at once: one autograd node and few kernels.

`materialize` of a method takes stacked factors, so linears whose factors have the same shapes are stacked, and the
whole model's pairs `(down [r, in], scaling * up [out, r])` cost a few launches instead of some per module. The node
saves modules, never tensors: factors are read again in the backward pass, and a part of the model can be differentiated
at a time, which reentrant checkpointing does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsr_scale.adapters.peft import AdapterLinear, AdapterMethod, LowRankPair, upcast, version_counters

Pair = tuple[Tensor, Tensor]
PairGradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Adapter:
    """One adapter of one linear."""

    linear: nn.Module
    name: str

    @property
    def method(self) -> type[AdapterMethod]:
        """How its factors make its pair."""
        return self.linear.method_of(self.name) if isinstance(self.linear, AdapterLinear) else LowRankPair

    @property
    def scaling(self) -> float:
        """The factor on its update."""
        linear: Any = self.linear
        ours = isinstance(linear, AdapterLinear)
        return linear.adapter_configs[self.name].scaling if ours else linear.scaling[self.name]

    def factors(self) -> dict[str, Tensor]:
        """Return its parameters by the method's names."""
        linear: Any = self.linear
        if isinstance(linear, AdapterLinear):
            return linear.factors(self.name)
        return {"down": linear.lora_A[self.name].weight, "up": linear.lora_B[self.name].weight}


def active_adapters(linear: nn.Module) -> list[Adapter]:
    """Return the adapters that take part in a linear's forward, in order; none for a plain or disabled linear."""
    if isinstance(linear, AdapterLinear):
        adapters: Any = linear.adapter_configs
    elif isinstance(linear, LoraLayer):
        adapters = linear.lora_A
    else:
        return []
    if linear.disable_adapters:
        return []
    return [Adapter(linear, name) for name in linear.active_adapters if name in adapters]


def materialize(adapters: Sequence[Adapter]) -> list[Pair]:
    """Return the pair of every adapter, scaling in `up`: float32 (float64 for such factors), differentiable."""
    if not adapters:
        return []
    factors = [adapter.factors() for adapter in adapters]
    flat = _Materialize.apply(  # pyright: ignore
        list(adapters), factors, *(factor for named in factors for factor in named.values())
    )
    return list(zip(flat[::2], flat[1::2], strict=True))


def concatenate_pairs(adapters: Sequence[Adapter], pairs: Sequence[Pair]) -> dict[int, Pair]:
    """Return the pair of each linear, by its identity: those of several adapters of one linear, concatenated in r."""
    by_linear: dict[int, Pair] = {}
    for adapter, (down, up) in zip(adapters, pairs, strict=True):
        before = by_linear.get(id(adapter.linear))
        if before is not None:
            down, up = torch.cat([before[0], down]), torch.cat([before[1], up], dim=1)
        by_linear[id(adapter.linear)] = down, up
    return by_linear


def _group_by_shape(
    adapters: Sequence[Adapter], factors: Sequence[dict[str, Tensor]], wanted: Sequence[int]
) -> list[list[int]]:
    """Group adapters of one method, scaling and set of shapes: lists of positions among `adapters`."""
    groups: dict[Any, list[int]] = {}
    for index in wanted:
        adapter = adapters[index]
        shapes = tuple((name, factor.shape, factor.dtype) for name, factor in factors[index].items())
        groups.setdefault((adapter.method, adapter.scaling, shapes), []).append(index)
    return list(groups.values())


def _versions(adapters: Sequence[Adapter], factors: Sequence[dict[str, Tensor]]) -> list[Any]:
    """Return what changes when a factor is changed in place or a scaling is set."""
    return [
        (adapter.scaling, version_counters(named.values())) for adapter, named in zip(adapters, factors, strict=True)
    ]


def _stacked(factors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return each factor of some adapters of equal shapes as one tensor, float32 or wider."""
    return upcast({name: torch.stack([named[name] for named in factors]) for name in factors[0]})


class _Materialize(torch.autograd.Function):
    """`(factors of every adapter) -> (down, up of every adapter)`."""

    @staticmethod
    def forward(
        ctx: Any, adapters: list[Adapter], factors: list[dict[str, Tensor]], *flat_factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.adapters = adapters
        ctx.set_materialize_grads(False)
        # `flat_factors` for autograd, `factors` by name; neither is saved: the backward pass reads the modules again
        device = flat_factors[0].device.type
        ctx.versions = _versions(adapters, factors)
        flat: list[Any] = [None] * (2 * len(adapters))
        for group in _group_by_shape(adapters, factors, range(len(adapters))):
            with torch.autocast(device, enabled=False):
                first = adapters[group[0]]
                down, up = first.method.materialize(_stacked([factors[index] for index in group]))
                # kernels read rows; a method may return them in any layout
                down, up = down.contiguous(), (up * first.scaling).contiguous()
            for position, index in enumerate(group):
                flat[2 * index], flat[2 * index + 1] = down[position], up[position]
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        adapters: list[Adapter] = ctx.adapters
        factors = [adapter.factors() for adapter in adapters]
        if _versions(adapters, factors) != ctx.versions:
            raise RuntimeError(
                "an adapter's factors or scaling were changed between the forward and the backward pass; "
                "change them after backward()"
            )
        results: list[list[Tensor | None]] = [[None] * len(named) for named in factors]
        wanted = [
            index for index in range(len(adapters)) if grads[2 * index] is not None or grads[2 * index + 1] is not None
        ]
        for group in _group_by_shape(adapters, factors, wanted):
            first = adapters[group[0]]
            device = next(iter(factors[group[0]].values())).device.type
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                stacked = _stacked([factors[index] for index in group])
                stacks = {name: stack.requires_grad_() for name, stack in stacked.items()}
                pair = first.method.materialize(stacks)
            # d/d(up before scaling) = scaling * d/d(up)
            gradients = [
                _stack_gradients([grads[2 * index + side] for index in group], pair[side], (1.0, first.scaling)[side])
                for side in (0, 1)
            ]
            # contiguous, or autograd would copy the factors' gradients one by one
            d_stacks = [stack.contiguous() for stack in torch.autograd.grad(pair, list(stacks.values()), gradients)]
            for position, index in enumerate(group):
                for place, (stack, factor) in enumerate(zip(d_stacks, factors[index].values(), strict=True)):
                    results[index][place] = stack[position].to(factor.dtype)
        return None, None, *(gradient for group in results for gradient in group)


def _stack_gradients(grads: Sequence[Tensor | None], like: Tensor, scale: float) -> Tensor:
    present = [torch.zeros_like(like[0]) if grad is None else grad for grad in grads]
    stacked = torch.stack(present).to(like.dtype)
    return stacked if scale == 1.0 else stacked * scale
