"""A side of the pair as a sum of Kronecker products: its gradient from its factors', and their steps from its own.

    side = sum_k L_k (x) R_k;   rearranged (`kron_terms`): L^T R with L `[S, p]`, R `[S, q]`, a term a row

`(L, R)` and `(M^-T L, M R)` are the same side for any invertible M `[S, S]`: the S^2 gauge of its terms, of which one
is `c L_k (x) R_k / c`. What is computed here does not depend on it:

- `side_gradient`: with G the side's gradient, its part in the directions in which factors can move the side,
  `P_L G + (I - P_L) G P_R`, where P_L and P_R project onto the rows of L and of R. It follows from the factors'
  gradients, `R G^T` and `L G`, by their Gram matrices: the rest of G never had to be kept.
- `factor_steps`: for a step T of the side, the steps of R and L by least squares, one after the other: R takes all of T
  that is in the span of L, `L^T dR = P_L T`, and L what is left, `dL^T R = (I - P_L) T P_R`, so that the side moves by
  T's part in the same directions. Where a term is smaller than the step (at the start R = 0), L would have to move far
  for that, and the product dL^T dR would outgrow the step: directions of the side are taken with the weight
  `w / (w + |T|^2)`, w their squared singular value in L^T R. This depends on the side alone, as all else does.

Gram matrices are float64; eigenvalues below 1e-12 of the largest count as zero. Leading dimensions are stacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsr_scale.adapters.kron_terms import Size, arranged, rearranged
from lsr_scale.training.optimizers.eigh import eigh

CUTOFF = 1e-12  # of eigenvalues of Gram matrices: 1e-6 of singular values, above what float32 resolves
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Side:
    """One side of the pairs of `n` modules of one shape.

    Attributes:
        left: `[n, S, P, Q]`, None for the identity.
        right: `[n, S, p, q]`.
        size: Rows and columns of the side itself.
    """

    left: Tensor | None
    right: Tensor
    size: Size

    @property
    def left_size(self) -> Size:
        """The size of a left factor."""
        if self.left is not None:
            return self.left.shape[-2], self.left.shape[-1]
        return self.size[0] // self.right.shape[-2], self.size[1] // self.right.shape[-1]

    @property
    def right_size(self) -> Size:
        """The size of a right factor."""
        return self.right.shape[-2], self.right.shape[-1]

    def dense(self) -> Tensor:
        """Return the side itself, `[n, *size]`."""
        if self.left is None:
            return _on_diagonal(self.right[:, 0], self.left_size[0])
        whole = torch.bmm(self.left.flatten(-2).mT, self.right.flatten(-2))
        return arranged(whole, self.left_size, self.right_size)


class Roots(NamedTuple):
    """Of symmetric matrices, all float64: eigenvectors `[n, k, k]`, eigenvalues, and their pseudo-inverse roots."""

    vectors: Tensor
    values: Tensor
    inverse_roots: Tensor


def gram(rows: Tensor) -> Tensor:
    """Return `X X^T` of matrices `X [n, k, m]`, float64."""
    wide = rows.double()
    return torch.bmm(wide, wide.mT)


def symmetric_roots(matrices: Tensor) -> Roots:
    """Return the decompositions of Gram matrices `[n, k, k]`; values that count as zero are zero, and so their roots.

    With `X X^T = V diag(values) V^T` an orthonormal basis of the rows of X is `diag(inverse roots) V^T X`.
    """
    values, vectors = eigh(matrices)
    dropped = values <= CUTOFF * values[:, -1:].clamp_min(TINY)
    return Roots(vectors, values.masked_fill(dropped, 0.0), values.masked_fill(dropped, torch.inf).rsqrt())


def gram_roots(rows: Tensor) -> Roots:
    """Return `symmetric_roots` of the Gram matrices of `X [..., k, m]`."""
    found = symmetric_roots(gram(rows.reshape(-1, *rows.shape[-2:])))
    return Roots(*(one.view(*rows.shape[:-2], *one.shape[1:]) for one in found))


class KronSides:
    """Sides of several shapes, and the decompositions of their terms' Gram matrices, all that have as many at once."""

    def __init__(self, sides: Sequence[Side]) -> None:
        """Decompose the sides' terms."""
        self.sides = list(sides)
        by_terms: dict[int, list[int]] = {}
        for index, side in enumerate(sides):
            if side.left is not None:
                by_terms.setdefault(side.left.shape[1], []).append(index)
        self._terms = [_Terms([sides[index] for index in indices]) for indices in by_terms.values()]
        self._indices = list(by_terms.values())

    def gradients(self, of_left: Sequence[Tensor | None], of_right: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of each side's gradient that its factors can follow, `[n, *size]`.

        Args:
            of_left: The gradients of the left factors, None for the identity.
            of_right: Those of the right factors.
        """
        found = list(of_right)
        for index, side in enumerate(self.sides):
            if side.left is None:
                k, one = side.left_size[0], of_right[index][:, 0]
                found[index] = one if k == 1 else _on_diagonal(one / k, k)
        for indices, terms in zip(self._indices, self._terms, strict=True):
            for place, index in enumerate(indices):
                left = of_left[index]
                assert left is not None
                found[index] = terms.gradient(place, left.flatten(-2), of_right[index].flatten(-2))
        return found

    def steps(self, steps: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
        """Return the steps of each side's factors that move it by a step `[n, *size]`, by least squares."""
        found: list[tuple[Tensor | None, Tensor]] = [(None, step) for step in steps]
        for index, (side, step) in enumerate(zip(self.sides, steps, strict=True)):
            if side.left is None:
                k = side.left_size[0]
                blocks = step.unflatten(-1, (k, -1)).unflatten(-3, (k, -1)).diagonal(dim1=-4, dim2=-2)
                found[index] = None, (step if k == 1 else blocks.mean(-1))[:, None]
        for indices, terms in zip(self._indices, self._terms, strict=True):
            for index, of_factors in zip(indices, terms.steps([steps[index] for index in indices]), strict=True):
                found[index] = of_factors
        return found


class _Terms:
    """Sides whose left factors are given, of equally many terms S; what is `[S, S]` is computed for all at once."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.lefts = [side.left.flatten(-2) for side in sides if side.left is not None]
        self.rights = [side.right.flatten(-2) for side in sides]
        self.wide_rights = [one.double() for one in self.rights]
        self.counts = [len(one) for one in self.lefts]
        grams = [*map(gram, self.lefts), *(torch.bmm(one, one.mT) for one in self.wide_rights)]
        vectors, values, inverse_roots = symmetric_roots(torch.cat(grams))
        spread = vectors * inverse_roots[:, None, :]
        inverses = torch.bmm(spread, spread.mT).to(self.lefts[0].dtype).split([*self.counts, *self.counts])
        self.inverse_lefts, self.inverse_rights = inverses[: len(sides)], inverses[len(sides) :]
        # L^T R between orthonormal bases of the rows of both
        roots = vectors * values.sqrt()[:, None, :]
        half = sum(self.counts)
        core = torch.bmm(roots[:half].mT, roots[half:])
        self.squared, self.spread = torch.bmm(core.mT, core), spread[half:]

    def gradient(self, place: int, of_left: Tensor, of_right: Tensor) -> Tensor:
        """Return the part of a side's gradient that its factors can follow."""
        side, left, right = self.sides[place], self.lefts[place], self.rights[place]
        in_span = torch.bmm(left.mT, torch.bmm(self.inverse_lefts[place], of_right))
        along = torch.bmm(torch.bmm(of_left, left.mT), self.inverse_lefts[place])
        outside = torch.baddbmm(of_left, along, left, alpha=-1)
        whole = torch.baddbmm(in_span, outside.mT, torch.bmm(self.inverse_rights[place], right))
        return arranged(whole, side.left_size, side.right_size)

    def steps(self, steps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the steps of the factors."""
        of_rights, rests, sizes = [], [], []
        for side, left, inverse, step in zip(self.sides, self.lefts, self.inverse_lefts, steps, strict=True):
            moved = rearranged(step, side.left_size, side.right_size)
            of_rights.append(torch.bmm(inverse, torch.bmm(left, moved)))
            rests.append(torch.baddbmm(moved, left.mT, of_rights[-1], alpha=-1))
            sizes.append(torch.linalg.vector_norm(moved, dim=(-2, -1), dtype=torch.float64))
        damped = self.squared.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.cat(sizes).square().clamp_min(TINY)[:, None])
        weights = torch.linalg.solve_ex(damped, self.squared).result
        mixes = torch.bmm(self.spread, weights).split(self.counts)
        found = []
        of_sides = zip(self.sides, self.spread.split(self.counts), self.wide_rights, mixes, rests, strict=True)
        for of_right, (side, spread, right, mix, rest) in zip(of_rights, of_sides, strict=True):
            basis = torch.bmm(spread.mT, right)  # orthonormal rows [S, q]
            of_left = torch.bmm(mix, torch.bmm(basis, rest.double().mT)).to(of_right.dtype)
            found.append((of_left.unflatten(-1, side.left_size), of_right.unflatten(-1, side.right_size)))
        return found


def side_gradient(side: Side, of_left: Tensor | None, of_right: Tensor) -> Tensor:
    """Return what `KronSides.gradients` does, of one side."""
    return KronSides([side]).gradients([of_left], [of_right])[0]


def factor_steps(side: Side, step: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what `KronSides.steps` does, of one side."""
    return KronSides([side]).steps([step])[0]


def _on_diagonal(blocks: Tensor, times: int) -> Tensor:
    """Return the identity of `times` rows times, in Kronecker's sense, matrices `[n, p, q]`."""
    if times == 1:
        return blocks
    n, p, q = blocks.shape
    whole = blocks.new_zeros(n, times, p, times, q)
    whole.diagonal(dim1=1, dim2=3).copy_(blocks[..., None])
    return whole.flatten(-2).flatten(1, 2)
