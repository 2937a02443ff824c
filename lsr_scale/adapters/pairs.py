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
    return AdapterBlocks([[adapter] for adapter in adapters], stacked=False).pairs()


class AdapterBlocks:
    """Adapters of trials in blocks, whose pairs come stacked: what stays the same from forward to forward.

    A block has adapters of one linear, of one method and equal shapes, one a trial; their scalings may differ. Blocks
    of all linears that are alike are materialized at once. Parameters are looked up once: a change of their data is
    seen, another parameter in the place of one is not.
    """

    def __init__(self, blocks: Sequence[Sequence[Adapter]], stacked: bool = True) -> None:
        """Take the blocks; if not `stacked` each is one adapter, whose pair is that of `materialize`."""
        self.blocks = [list(block) for block in blocks]
        self.stacked = stacked
        self._factors: list[list[dict[str, Tensor]]] | None = None
        self._scalings: list[list[float]] | None = None
        self._groups: list[Group] = []

    def pairs(self) -> list[Pair]:
        """Return `(down [n, r, in], scaling * up [n, out, r])` of every block; see `materialize`."""
        if not self.blocks:
            return []
        factors = self.factors()
        every = (factor for block in factors for named in block for factor in named.values())
        flat = _Materialize.apply(self, factors, self._grouped(factors), *every)  # pyright: ignore
        return list(zip(flat[::2], flat[1::2], strict=True))

    def factors(self) -> list[list[dict[str, Tensor]]]:
        """Return the parameters of every adapter, by the method's names."""
        if not self.stacked or self._factors is None:
            self._factors = [[adapter.factors() for adapter in block] for block in self.blocks]
        return self._factors

    def scalings(self) -> list[list[float]]:
        """Return the factor on every adapter's update, as it is now."""
        return [[adapter.scaling for adapter in block] for block in self.blocks]

    def _grouped(self, factors: Sequence[Sequence[dict[str, Tensor]]]) -> list[Group]:
        """Return what is materialized at once."""
        scalings = self.scalings()
        if scalings != self._scalings:
            groups: dict[Any, list[int]] = {}
            for index, (block, named) in enumerate(zip(self.blocks, factors, strict=True)):
                # a number is folded in without a tensor of its own, which one model needs no more than a few of
                own = () if self.stacked else tuple(scalings[index])
                groups.setdefault((kind_of(block[0], named[0]), own), []).append(index)
            self._groups = [(group, _scaling(group, scalings, factors)) for group in groups.values()]
            self._scalings = scalings
        return self._groups


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


def _versions(blocks: AdapterBlocks, factors: Sequence[Sequence[dict[str, Tensor]]]) -> Any:
    """Return what changes when a factor is changed in place or a scaling is set."""
    return blocks.scalings(), version_counters(
        factor for block in factors for named in block for factor in named.values()
    )


def _stacked(factors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return each factor of some adapters of equal shapes as one tensor, float32 or wider."""
    return upcast({name: torch.stack([named[name] for named in factors]) for name in factors[0]})


class _Materialize(torch.autograd.Function):
    """`(factors of every adapter) -> (down, up of every block)`."""

    @staticmethod
    def forward(
        ctx: Any, blocks: AdapterBlocks, factors: list[list[dict[str, Tensor]]], groups: list[Group], *flat: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.groups = blocks, groups
        ctx.set_materialize_grads(False)
        # `flat` for autograd, `factors` by name; neither is saved: the backward pass asks for them again
        device = flat[0].device.type
        ctx.versions = _versions(blocks, factors)
        pairs: list[Any] = [None] * (2 * len(factors))
        for group, scaling in groups:
            with torch.autocast(device, enabled=False):
                method = blocks.blocks[group[0]][0].method
                down, up = method.materialize(_stacked([named for index in group for named in factors[index]]))
                # kernels read rows; a method may return them in any layout
                down, up = down.contiguous(), (up * scaling).contiguous()
            for index, part in zip(group, _parts(factors, group), strict=True):
                place = part if blocks.stacked else part.start
                pairs[2 * index], pairs[2 * index + 1] = down[place], up[place]
        return tuple(pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        blocks: AdapterBlocks = ctx.blocks
        factors = blocks.factors()
        if _versions(blocks, factors) != ctx.versions:
            raise RuntimeError(
                "an adapter's factors or scaling were changed between the forward and the backward pass; "
                "change them after backward()"
            )
        results: list[list[list[Tensor | None]]] = [[[None] * len(named) for named in block] for block in factors]
        for group, scaling in ctx.groups:
            # the part of the model that is differentiated now
            places = zip(group, _parts(factors, group), strict=True)
            wanted = [(i, part) for i, part in places if grads[2 * i] is not None or grads[2 * i + 1] is not None]
            if not wanted:
                continue
            if isinstance(scaling, Tensor) and len(wanted) < len(group):
                scaling = torch.cat([scaling[part] for _, part in wanted])
            group = [index for index, _ in wanted]
            method, of_group = blocks.blocks[group[0]][0].method, [named for i in group for named in factors[i]]
            first = next(iter(of_group[0].values()))
            stacks = _stacked(of_group)
            trained = [name for name in stacks if name not in method.frozen_names]
            with torch.enable_grad(), torch.autocast(first.device.type, enabled=False):
                for name in trained:
                    stacks[name].requires_grad_()
                pair = method.materialize(stacks)
            join = torch.cat if blocks.stacked else torch.stack
            down, up = (
                join(_present([grads[2 * i + side] for i in group], pair[side], factors, group, blocks.stacked))
                for side in (0, 1)
            )
            # d/d(up before scaling) = scaling * d/d(up)
            gradients = [down.to(pair[0].dtype), up.to(pair[1].dtype) * scaling]
            # of a pair one side may be frozen
            sides = [(side, grad) for side, grad in zip(pair, gradients, strict=True) if side.requires_grad]
            d_stacks = torch.autograd.grad(
                [side for side, _ in sides], [stacks[name] for name in trained], [grad for _, grad in sides]
            )
            places = {name: place for place, name in enumerate(stacks)}
            for name, stack in zip(trained, d_stacks, strict=True):
                # contiguous, or autograd would copy the factors' gradients one by one
                rows = iter(stack.contiguous().to(of_group[0][name].dtype).unbind())
                for index in group:
                    for result in results[index]:
                        result[places[name]] = next(rows)
        return None, None, None, *(gradient for block in results for named in block for gradient in named)


def _parts(factors: Sequence[Sequence[Any]], group: Sequence[int]) -> list[slice]:
    """Return where the adapters of each block of a group are in its stacks."""
    parts, start = [], 0
    for index in group:
        parts.append(slice(start, start + len(factors[index])))
        start += len(factors[index])
    return parts


def _present(
    grads: Sequence[Tensor | None], like: Tensor, factors: Sequence[Sequence[Any]], group: Sequence[int], stacked: bool
) -> list[Tensor]:
    """Return the gradients of a group's pairs, zeros for those that have none."""
    shape = like.shape[1:]
    sizes = [(len(factors[index]), *shape) if stacked else shape for index in group]
    return [like.new_zeros(size) if grad is None else grad for grad, size in zip(grads, sizes, strict=True)]
