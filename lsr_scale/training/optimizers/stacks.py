"""Pairs of one device that are stepped at once: their factors out of a vector, their state as stacks, and their steps.

The state stays stacked from step to step. What an optimizer's `state` holds of a pair are views of the stacks, so what
reads it, such as a checkpoint, finds a pair's own; where something else was put there, stacks are made anew of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lsr_scale.training.optimizers.kron_side import KronSides, Side
from lsr_scale.training.optimizers.sides import HALVES, Pair, Part, Sides, Views

# of the rows of a stack: a step has several tensors of their size in memory
MOST_ELEMENTS = 2**25

State = dict[str, Any]
Change = tuple[Tensor, Tensor]  # a view of factors, and what is taken off them


@dataclass(frozen=True)
class Step:
    """What is stepped: sides of one rank, by group.

    Attributes:
        sides: Which they are.
        part: Where they are among those that have a state, None where they are all of them.
        rows: `[n, r, dim]` of each group.
        gradients: Alike, of a loss that sees `scaling * up @ down`.
        counts: The number of this step, 1 for the first, of each of `sides.pairs`.
    """

    sides: Sides
    part: Part | None
    rows: list[Tensor]
    gradients: list[Tensor]
    counts: list[int]

    def of_sides(self, value: Callable[[int], float]) -> float | Tensor:
        """Return what follows from the number of the step: one number, or `[2n, 1, 1]` where sides differ in it."""
        if len(set(self.counts)) == 1:
            return value(self.counts[0])
        values = {number: value(count) for number, count in zip(self.sides.pairs, self.counts, strict=True)}
        return self.rows[0].new_tensor([values[place.pair] for place in self.sides.places])[:, None, None]


class Steps(Protocol):
    """What is an optimizer's own."""

    pairwise: bool  # whether groups of sides are of pairs that are alike, downs and ups apart

    def begin(self, sides: Sides, states: Mapping[int, State], like: Tensor) -> Any:
        """Return the state of pairs as stacks, of which the values in `states` are views from then on.

        Args:
            sides: Theirs.
            states: What there is of each pair, from a checkpoint or another stack; what there is not, begins.
            like: Has the factors' device, and their dtype, or float32 where that has fewer bits.
        """

    def row_steps(self, step: Step, state: Any) -> list[Tensor]:
        """Return what is taken off each group's rows, and bring the state up to date.

        Args:
            step: What is stepped.
            state: What `begin` returned.
        """
        ...


@dataclass
class _Stack:
    """Pairs of one rank that have a state, so many that they are not too large together.

    Attributes:
        sides: Theirs.
        states: What the optimizer's `state` has of each pair.
        steps: `[n]`, on the CPU: how many steps each of `sides.pairs` has taken.
        own: The optimizer's own state.
        part: Those that took the last step that not all took, and where they are.
        data: The vector of factors at the last step, and its views.
    """

    sides: Sides
    states: dict[int, State]
    steps: Tensor
    own: Any
    part: tuple[Sides, Part] | None = None
    data: tuple[Tensor, Sides, list[Views]] | None = None

    def views(self, sides: Sides, data: Tensor) -> list[Views]:
        """Return `sides.views` of the vector of factors, which mostly is that of the last step."""
        if self.data is None or self.data[0] is not data or self.data[1] is not sides:
            self.data = data, sides, sides.views(data)
        return self.data[2]


class Stacks:
    """Pairs whose factors are in one vector."""

    def __init__(self, pairs: Mapping[int, Pair], steps: Steps) -> None:
        """Take the pairs by their numbers, whose factors are in a vector one after another, and who steps them."""
        self.pairs, self.steps = pairs, steps
        self._stacks: list[_Stack] = []
        self._offsets: dict[int, int] = {}
        end = 0
        for pair in pairs.values():
            for factor in pair.factors.values():
                self._offsets[id(factor)] = end
                end += factor.numel()

    def changes(
        self, data: Tensor, gradient: Tensor, absent: frozenset[int], state: Mapping[Any, State]
    ) -> list[Change]:
        """Return what a step takes off the factors, and bring the state up to date.

        Args:
            data: The vector of all factors.
            gradient: That of their gradients.
            absent: Pairs that are not stepped.
            state: The optimizer's, by a pair's first factor.
        """
        present = self.pairs.keys() - absent
        held = {number for stack in self._stacks for number in stack.states}
        if not held >= present or any(not self._is_bound(stack, state) for stack in self._stacks):
            self._begin(data, present, state)
        return [change for stack in self._stacks for change in self._step(stack, data, gradient, absent)]

    def _is_bound(self, stack: _Stack, state: Mapping[Any, State]) -> bool:
        """Tell whether the optimizer's state is that of a stack still; some may have been loaded, or dropped."""
        return all(state.get(self.pairs[number].first) is own for number, own in stack.states.items())

    def _begin(self, data: Tensor, present: set[int], state: Mapping[Any, State]) -> None:
        """Stack the pairs that have a state or take this step."""
        self._stacks = []
        together: dict[tuple[int, int], dict[int, Pair]] = {}
        elements: dict[int, int] = {}  # by rank
        for number, pair in self.pairs.items():
            if number in present or state.get(pair.first):
                so_far = elements.get(pair.rank, 0)
                together.setdefault((pair.rank, so_far // MOST_ELEMENTS), {})[number] = pair
                elements[pair.rank] = so_far + sum(math.prod(size) for size in pair.sizes.values())
        like = data.new_empty((), dtype=torch.promote_types(data.dtype, torch.float32))
        for pairs in together.values():
            sides = Sides(pairs, self._offsets, data.device, self.steps.pairwise)
            states = {number: state[self.pairs[number].first] for number in sides.pairs}
            steps = torch.tensor([float(one.get("step", 0)) for one in states.values()])
            for one, count in zip(states.values(), steps.unbind(), strict=True):
                one["step"] = count
            self._stacks.append(_Stack(sides, states, steps, self.steps.begin(sides, states, like)))

    def _step(self, stack: _Stack, data: Tensor, gradient: Tensor, absent: frozenset[int]) -> list[Change]:
        """Return the changes of one rank's factors."""
        sides, part = stack.sides, None
        if not absent.isdisjoint(stack.states):
            present = {number: self.pairs[number] for number in stack.states if number not in absent}
            if not present:
                return []
            if stack.part is None or set(stack.part[0].pairs) != present.keys():
                sides = Sides(present, self._offsets, data.device, self.steps.pairwise)
                stack.part = sides, sides.within(stack.sides)
            sides, part = stack.part
        which: Any = slice(None)
        if part is not None:
            rows = {number: row for row, number in enumerate(stack.sides.pairs)}
            which = [rows[number] for number in sides.pairs]
        stack.steps[which] += 1
        views = stack.views(sides, data)
        factors = [group.stack(one) for group, one in zip(sides.groups, views, strict=True)]
        read = KronSides([Side(*one, group.size) for group, one in zip(sides.groups, factors, strict=True)])
        lefts, rights = zip(
            *(group.stack(one) for group, one in zip(sides.groups, sides.views(gradient), strict=True)), strict=True
        )
        gradients = read.gradients(lefts, rights)
        counts = [int(count) for count in stack.steps[which].tolist()]
        step = Step(sides, part, [side.dense() for side in read.sides], gradients, counts)
        of_factors = read.steps(self.steps.row_steps(step, stack.own))
        found: list[Change] = []
        for group, of_group, changes in zip(sides.groups, views, of_factors, strict=True):
            for half, parts, change in zip(HALVES, of_group, changes, strict=True):
                if change is not None:
                    found += zip(parts, group.split(half, change), strict=True)
        return found


def bound_stack(states: Sequence[State], name: str | Sequence[str], zero: Tensor) -> Tensor:
    """Return a value of some states as one tensor, `[n, ...]`, of which theirs are views from then on.

    Args:
        states: One dictionary each.
        name: The value's name, or its name in each.
        zero: What it is where there is none.
    """
    names = [name] * len(states) if isinstance(name, str) else name
    stack = torch.stack([state.get(one, zero).to(zero) for one, state in zip(names, states, strict=True)])
    for one, state, view in zip(names, states, stack.unbind(), strict=True):
        state[one] = view
    return stack
