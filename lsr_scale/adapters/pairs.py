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
# positions of blocks that are materialized at once, and the factor on their updates: of all, or `[adapters, 1, 1]`
Group = tuple[list[int], float | Tensor]


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
    factors = [adapter.factors() for adapter in adapters]
    groups: dict[Any, list[int]] = {}
    for index, (adapter, named) in enumerate(zip(adapters, factors, strict=True)):
        groups.setdefault((*kind_of(adapter, named), adapter.scaling), []).append(index)
    by_scaling: list[Group] = [(group, kind[-1]) for kind, group in groups.items()]
    return _pairs([[adapter] for adapter in adapters], [[named] for named in factors], by_scaling, stacked=False)


class AdapterBlocks:
    """Adapters of trials in blocks, whose pairs come stacked: what stays the same from forward to forward.

    A block has adapters of one linear, of one method and equal shapes, one a trial; their scalings may differ. Blocks
    of all linears that are alike are materialized at once.
    """

    def __init__(self, blocks: Sequence[Sequence[Adapter]]) -> None:
        """Take the blocks."""
        self.blocks = [list(block) for block in blocks]
        self._groups: list[Group] = []
        self._scalings: list[list[float]] | None = None

    def pairs(self) -> list[Pair]:
        """Return `(down [n, r, in], scaling * up [n, out, r])` of every block; see `materialize`."""
        factors = [[adapter.factors() for adapter in block] for block in self.blocks]
        scalings = [[adapter.scaling for adapter in block] for block in self.blocks]
        if scalings != self._scalings:
            groups: dict[Any, list[int]] = {}
            for index, (block, named) in enumerate(zip(self.blocks, factors, strict=True)):
                groups.setdefault(kind_of(block[0], named[0]), []).append(index)
            self._groups = [(group, self._scaling(group, scalings, factors)) for group in groups.values()]
            self._scalings = scalings
        return _pairs(self.blocks, factors, self._groups, stacked=True)

    @staticmethod
    def _scaling(
        group: Sequence[int], scalings: Sequence[Sequence[float]], factors: Sequence[Sequence[dict[str, Tensor]]]
    ) -> float | Tensor:
        """Return the factors on the updates of some blocks: a number, or a tensor `[adapters, 1, 1]`."""
        values = [scaling for index in group for scaling in scalings[index]]
        if len(set(values)) == 1:
            return values[0]
        like = next(iter(factors[group[0]][0].values()))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=like.device)[:, None, None]


def kind_of(adapter: Adapter, factors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return what adapters must have in common to be materialized at once."""
    return adapter.method, tuple((name, factor.shape, factor.dtype) for name, factor in factors.items())


def concatenate_pairs(adapters: Sequence[Adapter], pairs: Sequence[Pair]) -> dict[int, Pair]:
    """Return the pair of each linear, by its identity: those of several adapters of one linear, concatenated in r."""
    by_linear: dict[int, Pair] = {}
    for adapter, (down, up) in zip(adapters, pairs, strict=True):
        before = by_linear.get(id(adapter.linear))
        if before is not None:
            down, up = torch.cat([before[0], down]), torch.cat([before[1], up], dim=1)
        by_linear[id(adapter.linear)] = down, up
    return by_linear


def _pairs(
    blocks: list[list[Adapter]], factors: list[list[dict[str, Tensor]]], groups: list[Group], stacked: bool
) -> list[Pair]:
    if not blocks:
        return []
    every = (factor for block in factors for named in block for factor in named.values())
    flat = _Materialize.apply(blocks, groups, stacked, factors, *every)  # pyright: ignore
    return list(zip(flat[::2], flat[1::2], strict=True))


def _versions(blocks: Sequence[Sequence[Adapter]], factors: Sequence[Sequence[dict[str, Tensor]]]) -> list[Any]:
    """Return what changes when a factor is changed in place or a scaling is set."""
    return [
        (adapter.scaling, version_counters(named.values()))
        for block, of_block in zip(blocks, factors, strict=True)
        for adapter, named in zip(block, of_block, strict=True)
    ]


def _stacked(factors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return each factor of some adapters of equal shapes as one tensor, float32 or wider."""
    return upcast({name: torch.stack([named[name] for named in factors]) for name in factors[0]})


class _Materialize(torch.autograd.Function):
    """`(factors of every adapter) -> (down, up of every block)`."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: list[list[Adapter]],
        groups: list[Group],
        stacked: bool,
        factors: list[list[dict[str, Tensor]]],
        *flat_factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.groups, ctx.stacked = blocks, groups, stacked
        ctx.set_materialize_grads(False)
        # `flat_factors` for autograd, `factors` by name; neither is saved: the backward pass reads the modules again
        device = flat_factors[0].device.type
        ctx.versions = _versions(blocks, factors)
        flat: list[Any] = [None] * (2 * len(blocks))
        for group, scaling in groups:
            with torch.autocast(device, enabled=False):
                method = blocks[group[0]][0].method
                down, up = method.materialize(_stacked([named for index in group for named in factors[index]]))
                # kernels read rows; a method may return them in any layout
                down, up = down.contiguous(), (up * scaling).contiguous()
            for index, part in zip(group, _parts(blocks, group), strict=True):
                place = part if stacked else part.start
                flat[2 * index], flat[2 * index + 1] = down[place], up[place]
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        blocks: list[list[Adapter]] = ctx.blocks
        factors = [[adapter.factors() for adapter in block] for block in blocks]
        if _versions(blocks, factors) != ctx.versions:
            raise RuntimeError(
                "an adapter's factors or scaling were changed between the forward and the backward pass; "
                "change them after backward()"
            )
        results: list[list[list[Tensor | None]]] = [[[None] * len(named) for named in block] for block in factors]
        for group, scaling in ctx.groups:
            # the part of the model that is differentiated now
            places = zip(group, _parts(blocks, group), strict=True)
            wanted = [(i, part) for i, part in places if grads[2 * i] is not None or grads[2 * i + 1] is not None]
            if not wanted:
                continue
            if isinstance(scaling, Tensor) and len(wanted) < len(group):
                scaling = torch.cat([scaling[part] for _, part in wanted])
            group = [index for index, _ in wanted]
            method, of_group = blocks[group[0]][0].method, [named for index in group for named in factors[index]]
            device = next(iter(of_group[0].values())).device.type
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                stacks = {name: stack.requires_grad_() for name, stack in _stacked(of_group).items()}
                pair = method.materialize(stacks)
            down, up = (_joined([grads[2 * i + side] for i in group], pair[side], ctx, group) for side in (0, 1))
            # d/d(up before scaling) = scaling * d/d(up)
            gradients = [down, up * scaling]
            # contiguous, or autograd would copy the factors' gradients one by one
            d_stacks = [stack.contiguous() for stack in torch.autograd.grad(pair, list(stacks.values()), gradients)]
            for index, part in zip(group, _parts(blocks, group), strict=True):
                for number, named in enumerate(factors[index]):
                    for place, (stack, factor) in enumerate(zip(d_stacks, named.values(), strict=True)):
                        results[index][number][place] = stack[part.start + number].to(factor.dtype)
        flat = (gradient for block in results for named in block for gradient in named)
        return None, None, None, None, *flat


def _parts(blocks: Sequence[Sequence[Adapter]], group: Sequence[int]) -> list[slice]:
    """Return where the adapters of each block of a group are in its stacks."""
    parts, start = [], 0
    for index in group:
        parts.append(slice(start, start + len(blocks[index])))
        start += len(blocks[index])
    return parts


def _joined(grads: Sequence[Tensor | None], like: Tensor, ctx: Any, group: Sequence[int]) -> Tensor:
    """Return the gradients of a group's pairs in one tensor, in the dtype of the stack that they are of."""
    shape = like.shape[1:]
    sizes = [(len(ctx.blocks[index]), *shape) if ctx.stacked else shape for index in group]
    present = [like.new_zeros(size) if grad is None else grad for grad, size in zip(grads, sizes, strict=True)]
    return (torch.cat if ctx.stacked else torch.stack)(present).to(like.dtype)
