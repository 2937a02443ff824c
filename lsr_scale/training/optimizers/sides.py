"""The sides of many pairs, stacked by shape, out of one vector of all factors, and back into it.

A pair's sides are taken as rows `[r, dim]`: down as it is, up transposed. So sides of one shape are one stack, whatever
linear they are of and whichever side they are. What is `[r, r]` of a side is stacked over all sides of a rank.

Factors of one shape are mostly at equal distances in the vector, as a model's layers are alike: such a run is one view
of it, and a stack costs the host a call, not one for each module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsr_scale.adapters.pairs import Adapter, kind_of

NAMES = ("down", "up")
HALVES = ("left", "right")
_LOOKS_AHEAD = 16  # factors among which the next one of a run is looked for


@dataclass(frozen=True)
class Pair:
    """One adapter.

    Attributes:
        adapter: The adapter.
        factors: Its parameters by the method's names.
        sides: The names of each side's left and right factors, as `kron_sides` gives them.
        kind: What pairs have in common that are alike.
        sizes: `[r, dim]` of each side.
        rank: The rank r of the update.
        first: The factor whose state in the optimizer is the pair's.
    """

    adapter: Adapter
    factors: dict[str, nn.Parameter]
    sides: dict[str, tuple[str | None, str]]
    kind: Any
    sizes: dict[str, tuple[int, int]]
    rank: int
    first: nn.Parameter

    @classmethod
    def of(cls, adapter: Adapter, sizes_of: dict[Any, dict[str, tuple[int, int]]]) -> "Pair | None":
        """Return an adapter's, None where its sides are no sums of Kronecker products.

        Args:
            adapter: The adapter.
            sizes_of: The sizes of pairs by their kind, as far as they are known; filled in.
        """
        factors: Any = adapter.factors()
        sides, kind = adapter.method.kron_sides(factors), kind_of(adapter, factors)
        if not sides:
            return None
        if kind not in sizes_of:
            down, up = adapter.method.materialize({name: one.detach().to("meta") for name, one in factors.items()})
            sizes_of[kind] = {"down": (down.shape[0], down.shape[1]), "up": (up.shape[1], up.shape[0])}
        sizes = sizes_of[kind]
        return cls(adapter, factors, sides, kind, sizes, sizes["down"][0], next(iter(factors.values())))


class Place(NamedTuple):
    """A side: the number of its pair, and which of both it is."""

    pair: int
    name: str


class _Run(NamedTuple):
    """Factors of one shape at equal distances in a vector."""

    number: int
    offset: int
    distance: int
    shape: torch.Size

    def view(self, vector: Tensor) -> Tensor:
        """Return them as `[number, S, ...]`: of one term, if they have none of their own."""
        rows, columns = self.shape[-2:]
        terms = self.shape[0] if len(self.shape) == 3 else 1
        shape, strides = (self.number, terms, rows, columns), (self.distance, rows * columns, columns, 1)
        return vector.as_strided(shape, strides, vector.storage_offset() + self.offset)


@dataclass(frozen=True)
class Part:
    """Where some sides are among others, of which they are a part.

    Attributes:
        numbers: `[2n]`, of each among all.
        groups: For each of their groups the number of the others' group that it is of.
        rows: Of each group: where its sides are in that group.
        index: `[n]` of each group: the same, on the device.
    """

    numbers: Tensor
    groups: list[int]
    rows: list[list[int]]
    index: list[Tensor]


@dataclass
class Group:
    """Sides of one shape.

    Attributes:
        size: `[r, dim]` of each.
        places: Which they are, in the stack's order.
        runs: Of the left and of the right factors, in that order, and whether they are those of up.
    """

    size: tuple[int, int]
    places: list[Place] = field(default_factory=list)
    runs: dict[str, list[tuple[_Run, bool]]] = field(default_factory=lambda: {"left": [], "right": []})

    def views(self, vector: Tensor) -> "Views":
        """Return the runs' factors in a vector: `[n, S, ...]` each, of the left and of the right ones."""
        return Views(*([run.view(vector) for run, _ in self.runs[half]] for half in HALVES))

    def stack(self, views: "Views") -> tuple[Tensor | None, Tensor]:
        """Return the left and right factors of the sides as rows, `[n, S, ...]`; left is None for the identity."""
        stacks: list[Tensor | None] = []
        for half, parts in zip(HALVES, views, strict=True):
            as_rows = [part.mT if is_up else part for part, (_, is_up) in zip(parts, self.runs[half], strict=True)]
            whole = as_rows[0] if len(as_rows) == 1 else torch.cat(as_rows) if as_rows else None
            stacks.append(None if whole is None else whole.to(torch.promote_types(whole.dtype, torch.float32)))
        left, right = stacks
        assert right is not None
        return left, right

    def split(self, half: str, stack: Tensor) -> list[Tensor]:
        """Return the runs' parts of what belongs to the left or right factors as rows, as `views` has them."""
        parts = stack.split([run.number for run, _ in self.runs[half]])
        return [part.mT if is_up else part for part, (_, is_up) in zip(parts, self.runs[half], strict=True)]


class Views(NamedTuple):
    """Runs of left and of right factors in a vector."""

    left: list[Tensor]
    right: list[Tensor]


class Sides:
    """Sides of pairs of one rank, in groups.

    Attributes:
        groups: Sides of one shape each; with `pairwise` the downs of pairs that are alike, then their ups, and so on.
        places: The sides of all groups, in order.
        counts: How many each group has.
        pairs: The numbers of the pairs, those that are alike together.
        other: `[2n]`, for each side the number of its pair's other side, among all.
        dims: `[2n, 1, 1]`, float32: the dim of each.
    """

    def __init__(
        self,
        pairs: Mapping[int, Pair],
        offsets: Mapping[int, int],
        device: torch.device,
        pairwise: bool = False,
    ) -> None:
        """Take the pairs.

        Args:
            pairs: By their numbers, of one rank.
            offsets: Where factors begin in a vector, by their identity.
            device: The factors'.
            pairwise: Keep those of unlike pairs, and downs and ups, apart.
        """
        kinds: dict[Any, list[int]] = {}
        for number, pair in pairs.items():
            kinds.setdefault(pair.kind, []).append(number)
        groups: dict[Any, Group] = {}
        self.pairs: list[int] = []
        for kind, numbers in kinds.items():
            where = [tuple(offsets[id(factor)] for factor in pairs[number].factors.values()) for number in numbers]
            runs = [[numbers[index] for index in run] for run in _runs(where)]
            self.pairs += [number for run in runs for number in run]
            for name in NAMES:
                one = pairs[numbers[0]]
                shapes = tuple(_rows_shape(one, factor, name) for factor in one.sides[name])
                key = (kind, name) if pairwise else (one.sizes[name], shapes)
                group = groups.setdefault(key, Group(one.sizes[name]))
                for run in runs:
                    group.places += [Place(number, name) for number in run]
                    for half, factor in zip(HALVES, one.sides[name], strict=True):
                        if factor is not None:
                            of = [pairs[number].factors[factor] for number in run]
                            starts = [offsets[id(parameter)] for parameter in of]
                            distance = starts[1] - starts[0] if len(run) > 1 else 0
                            group.runs[half].append((_Run(len(run), starts[0], distance, of[0].shape), name == "up"))
        self.groups = list(groups.values())
        self.places = [place for group in self.groups for place in group.places]
        self.counts = [len(group.places) for group in self.groups]
        self.number_of = {place: number for number, place in enumerate(self.places)}
        opposite = [self.number_of[Place(place.pair, NAMES[place.name == "down"])] for place in self.places]
        self.other = torch.tensor(opposite, device=device)
        dims = [float(group.size[1]) for group in self.groups for _ in group.places]
        self.dims = torch.tensor(dims, dtype=torch.float32, device=device)[:, None, None]

    def within(self, whole: "Sides") -> Part:
        """Return where these are among the sides of more pairs."""
        device, groups, rows = self.other.device, [], []
        where = {place: (n, row) for n, group in enumerate(whole.groups) for row, place in enumerate(group.places)}
        for group in self.groups:
            groups.append(where[group.places[0]][0])
            rows.append([where[place][1] for place in group.places])
        numbers = torch.tensor([whole.number_of[place] for place in self.places], device=device)
        return Part(numbers, groups, rows, [torch.tensor(of_group, device=device) for of_group in rows])

    def views(self, vector: Tensor) -> list[Views]:
        """Return the factors in a vector by group, as `Group.views` does."""
        return [group.views(vector) for group in self.groups]


def _rows_shape(pair: Pair, factor: str | None, name: str) -> tuple[int, ...] | None:
    """Return the shape of a factor of a side that is taken as rows, None for the identity."""
    if factor is None:
        return None
    *terms, rows, columns = pair.factors[factor].shape
    return (*(terms or [1]), *((columns, rows) if name == "up" else (rows, columns)))


def _runs(where: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Return the indices of what is at some places in runs: places of a run are at equal distances in all numbers."""
    left = {place: index for index, place in enumerate(where)}
    runs = []
    while left:
        places = [place for place, _ in zip(left, range(_LOOKS_AHEAD + 1), strict=False)]
        first, longest = places[0], places[:1]
        for second in places[1:]:
            run, step = [first], tuple(b - a for a, b in zip(first, second, strict=True))
            while (place := tuple(a + b for a, b in zip(run[-1], step, strict=True))) in left:
                run.append(place)
            longest = run if len(run) > len(longest) else longest
        runs.append([left.pop(place) for place in longest])
    return runs
