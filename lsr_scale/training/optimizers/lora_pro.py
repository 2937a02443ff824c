"""LoRA-Pro (arXiv 2407.18242): steps of a pair whose product moves as full fine-tuning would, as nearly as it can.

With s the scaling, A = down, B = up, G_A and G_B their gradients and g that of the weight, the pair (g_A, g_B) that
minimizes `|s (B g_A + g_B A) - g|` (Frobenius) is

    g_A = (1/s^2) (B^T B)^-1 G_A + X A,   g_B = (1/s^2) (I - B (B^T B)^-1 B^T) G_B (A A^T)^-1 - B X

for any X `[r, r]`; that which is nearest to (G_A, G_B) solves the Sylvester equation

    B^T B X + X A A^T = -(1/s^2) (B^T B)^-1 G_A A^T

here by eigendecompositions of both Gram matrices. Adam's moments are of the equivalent gradient `s (B g_A + g_B A)`,
and its step, of the weight's size, is brought to the pair by the same equations. So rates are those of full
fine-tuning, not of LoRA, and s is the module's own (the released code has 16/8 in its place).

Regularization: inverses are pseudo-inverses of Gram matrices in float64 whose eigenvalues below 1e-12 of the largest
count as zero. At up = 0 that gives the paper's first step, `g_A = 0, g_B = (1/s^2) G_B (A A^T)^-1`. Where B is small
though not zero, as in the steps after that, or where the update needs less than its rank, (B^T B)^-1 moves A so far
that the product of both steps outgrows the step itself, which the equations do not see. So Adam's step T, the rate
included, is brought to the pair by `(B^T B + mu I)^-1` in all three places, with `mu = |T P_A|^2 / (s^2 |A|^2 / r)`:
directions of B that are small beside the step leave their part to B. The product moves within the same directions, by
`P T + (I - P) T P_A` with `P = B (B^T B + mu I)^-1 B^T`, and for small steps it is the paper's.

State: Adam's two moments of the weight's size, `[out, in]` in float32, whatever the rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsr_scale.training.optimizers.kron_side import TINY, Roots, gram, symmetric_roots
from lsr_scale.training.optimizers.pair_optimizer import PairOptimizer
from lsr_scale.training.optimizers.sides import Sides
from lsr_scale.training.optimizers.stacks import State, Step, bound_stack

# of matrices of the weights' size that are stepped at once: a step has several tensors of theirs in memory, and on a
# CPU in its caches
MOST_ELEMENTS = 2**25
MOST_ELEMENTS_ON_CPU = 2**19


@dataclass
class Moments:
    """Of pairs that are alike, `[n, out, in]` each, in stacks of so many that they are not too large together."""

    stacks: list[tuple[Tensor, Tensor]]

    def parts(self, rows: list[int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the moments of some pairs as views, with which of the `rows` they are.

        Args:
            rows: The pairs' numbers among all that are alike.
        """
        height, done = len(self.stacks[0][0]), 0
        while done < len(rows):
            number, first = divmod(rows[done], height)
            count = 1
            while done + count < len(rows) and rows[done + count] == rows[done] + count and first + count < height:
                count += 1
            moment, second = self.stacks[number]
            yield slice(done, done + count), moment[first : first + count], second[first : first + count]
            done += count


class LoraPro(PairOptimizer):
    """LoRA-Pro with Adam; see the equations above."""

    saved_as = "LoraPro"
    pairwise = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what every optimizer of pairs takes."""
        super().__init__(*args, **kwargs)
        self._known_scalings: dict[int, tuple[tuple[float, ...], Tensor]] = {}  # by the first of some pairs

    def begin(self, sides: Sides, states: Mapping[int, State], like: Tensor) -> list[Moments]:
        """Return the state of pairs by their kind; moments begin at zero."""
        found = []
        for down, up in zip(sides.groups[::2], sides.groups[1::2], strict=True):
            owners = [states[place.pair] for place in down.places]
            shape = up.size[1], down.size[1]
            most = MOST_ELEMENTS_ON_CPU if like.device.type == "cpu" else MOST_ELEMENTS
            height = max(1, most // (shape[0] * shape[1]))
            zero = like.new_zeros(()).expand(shape)
            stacks = []
            for first in range(0, len(owners), height):
                of = owners[first : first + height]
                stacks.append((bound_stack(of, "weight_moment", zero), bound_stack(of, "weight_second", zero)))
            found.append(Moments(stacks))
        return found

    def row_steps(self, step: Step, state: list[Moments]) -> list[Tensor]:
        """Return the pairs' shares of Adam's steps of their equivalent gradients."""
        rate, sides = self.param_groups[0]["lr"], step.sides
        downs, ups = step.rows[::2], [rows.mT for rows in step.rows[1::2]]
        gradients = step.gradients[::2], [rows.mT for rows in step.gradients[1::2]]
        numbers = [len(one) for one in downs]
        roots = symmetric_roots(torch.cat([gram(rows) for rows in (*downs, *step.rows[1::2])]))
        of_down, of_up = (Roots(*one) for one in zip(*(part.chunk(2) for part in roots), strict=True))
        s = self._scalings(sides.pairs, downs[0])
        nearest = nearest_pairs(downs, ups, gradients, s, of_down, of_up)
        of_pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for kind, scaling in enumerate(s.split(numbers)):
            found = self._weight_steps(step, kind, state, scaling * downs[kind], scaling * ups[kind], nearest[kind])
            for so_far, one in zip(of_pairs, found, strict=True):
                so_far.append(one)
        # |T P_A|^2, of G_B = s T A^T
        squares = torch.bmm(of_down.vectors.mT, torch.cat([gram(one.mT) for one in of_pairs[1]]))
        squares = (squares * of_down.vectors.mT).sum(-1) * of_down.inverse_roots.square()
        size = (squares.sum(-1) / of_down.values.sum(-1).clamp_min(TINY))[:, None, None]
        damping = size * (rate**2 * downs[0].shape[1]) / s**4
        changes = nearest_pairs(downs, ups, of_pairs, s, of_down, of_up, damping)
        return [one * rate for down, up in changes for one in (down, up.mT)]

    def _weight_steps(
        self, step: Step, kind: int, state: list[Moments], down: Tensor, up: Tensor, nearest: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what Adam's steps of the equivalent gradients of one kind of pairs are to their factors.

        Args:
            step: What is stepped.
            kind: The number of the kind.
            state: The optimizer's.
            down: The pairs', times their scaling.
            up: Likewise.
            nearest: Their g_A and g_B.
        """
        counts = dict(zip(step.sides.pairs, step.counts, strict=True))
        of_kind = [counts[place.pair] for place in step.sides.groups[2 * kind].places]
        moments, rows = state[kind], list(range(len(of_kind)))
        if step.part is not None:
            moments, rows = state[step.part.groups[2 * kind] // 2], step.part.rows[2 * kind]
        of_downs, of_ups = [], []
        for part, moment, second in moments.parts(rows):
            gradient = torch.baddbmm(torch.bmm(nearest[1][part], down[part]), up[part], nearest[0][part])
            adam = self._adam(gradient, moment, second, of_kind[part])
            of_downs.append(torch.bmm(up[part].mT, adam))
            of_ups.append(torch.bmm(adam, down[part].mT))
        return torch.cat(of_downs), torch.cat(of_ups)

    def _scalings(self, pairs: list[int], like: Tensor) -> Tensor:
        """Return the pairs' scalings, `[n, 1, 1]`; they are taken to the device once, and where they change."""
        values = tuple(self.pairs[number].adapter.scaling for number in pairs)
        known = self._known_scalings.get(pairs[0])
        if known is None or known[0] != values or known[1].device != like.device:
            known = self._known_scalings[pairs[0]] = values, like.new_tensor(values)[:, None, None]
        return known[1]

    def _adam(self, gradient: Tensor, moment: Tensor, second: Tensor, counts: list[int]) -> Tensor:
        """Return Adam's steps for gradients of the weights' size `[n, out, in]`, which are written over.

        Args:
            gradient: The gradients.
            moment: Their mean so far, brought up to date.
            second: That of their squares, likewise.
            counts: The number of this step, of each.
        """
        (beta1, beta2), eps = self.param_groups[0]["betas"], self.param_groups[0]["eps"]
        corrections: list[Any] = [[1 - beta**count for count in counts] for beta in (beta1, beta2)]
        same = len(set(counts)) == 1
        of_moment, of_second = (one[0] if same else moment.new_tensor(one)[:, None, None] for one in corrections)
        moment.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.div(second, of_second, out=gradient).sqrt_().add_(eps)
        return torch.div(moment, root, out=root).div_(of_moment)


def nearest_pairs(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    gradients: tuple[Sequence[Tensor], Sequence[Tensor]],
    s: Tensor | float,
    of_down: Roots,
    of_up: Roots,
    damping: Tensor | float = 0.0,
) -> list[tuple[Tensor, Tensor]]:
    """Return `(g_A [n, r, in], g_B [n, out, r])` of the equations above, of N pairs of several shapes.

    Args:
        downs: `[n, r, in]` of each shape.
        ups: `[n, out, r]` of each shape.
        gradients: Of both.
        s: The scalings, `[N, 1, 1]` of all pairs, or one number.
        of_down: `symmetric_roots(down down^T)` of all pairs.
        of_up: `symmetric_roots(up^T up)`.
        damping: mu, `[N, 1, 1]` or a number.
    """
    numbers, dtype = [len(one) for one in downs], downs[0].dtype
    (a, values_a, roots_a), (b, values_b, roots_b) = of_down, of_up
    squares_a, squares_b = roots_a.square()[:, None, :], roots_b.square()[:, None, :]
    inverse_down = torch.bmm(a * squares_a, a.mT)
    inverse_up = torch.bmm(b * (squares_b / (1 + damping * squares_b)), b.mT)
    over_down, over_up = (one.div(s**2).to(dtype).split(numbers) for one in (inverse_down, inverse_up))
    along = [torch.bmm(inverse, one) for inverse, one in zip(over_up, gradients[0], strict=True)]
    # in the bases of eigenvectors the equation is one division an element
    right = torch.cat([torch.bmm(one, down.mT) for one, down in zip(along, downs, strict=True)]).double()
    sums = values_b[:, :, None] + values_a[:, None, :]
    x = torch.bmm(torch.bmm(b.mT, right), a) / sums.masked_fill_(sums <= 0, -torch.inf).neg_()
    x = torch.bmm(torch.bmm(b, x), a.mT).to(dtype).split(numbers)
    across = [torch.bmm(one, inverse) for one, inverse in zip(gradients[1], over_down, strict=True)]
    within = [torch.bmm(up.mT, one) for up, one in zip(ups, across, strict=True)]
    projected = [torch.bmm(*one) for one in zip(inverse_up.to(dtype).split(numbers), within, strict=True)]
    return [
        (torch.baddbmm(along[i], x[i], downs[i]), torch.baddbmm(across[i], ups[i], projected[i] + x[i], alpha=-1))
        for i in range(len(downs))
    ]


def nearest_pair(
    pair: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    s: float,
    of_down: Roots,
    of_up: Roots,
    damping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return what `nearest_pairs` does, of one pair: `(g_A [r, in], g_B [out, r])`."""
    down, up, of_a, of_b = ([one[None]] for one in (*pair, *gradients))
    roots = [Roots(*(one[None] for one in of)) for of in (of_down, of_up)]
    ((g_a, g_b),) = nearest_pairs(down, up, (of_a, of_b), s, roots[0], roots[1], damping)
    return g_a[0], g_b[0]
