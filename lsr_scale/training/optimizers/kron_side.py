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

from dataclasses import dataclass

import torch
from torch import Tensor

from lsr_scale.adapters.kron_terms import Size, arranged, rearranged

CUTOFF = 1e-12  # of eigenvalues of Gram matrices: 1e-6 of singular values, above what float32 resolves


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


def gram_roots(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of matrices `X [..., k, n]` the eigenvectors `[..., k, k]`, eigenvalues and their pseudo-inverse roots.

    `X X^T = V diag(values) V^T`; an orthonormal basis of the rows is `diag(inverse roots) V^T X`. All float64.
    """
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    kept = values > CUTOFF * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = torch.where(kept, values, 1.0).rsqrt() * kept
    return vectors, torch.where(kept, values, 0.0), roots


def side_gradient(side: Side, of_left: Tensor | None, of_right: Tensor) -> Tensor:
    """Return the part of a side's gradient that its factors can follow, `[n, *size]`.

    Args:
        side: The side.
        of_left: The gradient of its left factors, None for the identity.
        of_right: That of its right factors.
    """
    if side.left is None or of_left is None:
        k = side.left_size[0]
        if k == 1:
            return of_right[..., 0, :, :]
        eye = torch.eye(k, dtype=of_right.dtype, device=of_right.device)
        blocks = (of_right[..., 0, :, :] / k)[..., None, :, None, :] * eye[:, None, :, None]
        return blocks.flatten(-2).flatten(-3, -2)
    left, right = side.left.flatten(-2), side.right.flatten(-2)
    inverse_left, inverse_right = (_pseudo_inverse(gram_roots(one)).to(one.dtype) for one in (left, right))
    in_span = left.mT @ (inverse_left @ of_right.flatten(-2))
    flat = of_left.flatten(-2)
    outside = flat - (flat @ left.mT) @ inverse_left @ left
    return arranged(in_span + outside.mT @ (inverse_right @ right), side.left_size, side.right_size)


def factor_steps(side: Side, step: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the steps of a side's left and right factors that move it by a step `[n, *size]`, by least squares."""
    moved = rearranged(step, side.left_size, side.right_size)
    if side.left is None:
        k = side.left_size[0]
        # the identity as a vector picks the blocks on the diagonal
        of_right = moved.unflatten(-2, (k, k)).diagonal(dim1=-3, dim2=-2).mean(-1)
        return None, of_right.unflatten(-1, side.right_size).unsqueeze(-3)
    left, right = side.left.flatten(-2), side.right.flatten(-2)
    left_roots, right_roots = gram_roots(left), gram_roots(right)
    of_right = _pseudo_inverse(left_roots).to(left.dtype) @ (left @ moved)
    rest = moved - left.mT @ of_right
    left_vectors, left_values, _ = left_roots
    vectors, values, inverse_roots = right_roots
    # L^T R between orthonormal bases of the rows of both
    core = left_values.sqrt()[..., :, None] * (left_vectors.mT @ vectors) * values.sqrt()[..., None, :]
    squared = core.mT @ core
    size = moved.double().square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(squared.shape[-1], dtype=squared.dtype, device=squared.device)
    weights = torch.linalg.solve_ex(squared + size * eye, squared).result
    basis = inverse_roots[..., :, None] * (vectors.mT @ right.double())  # orthonormal rows [S, q]
    of_left = (vectors * inverse_roots[..., None, :]) @ weights @ (basis @ rest.double().mT)
    return of_left.to(left.dtype).unflatten(-1, side.left_size), of_right.unflatten(-1, side.right_size)


def _pseudo_inverse(roots: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    vectors, _, inverse_roots = roots
    return (vectors * inverse_roots.square()[..., None, :]) @ vectors.mT
