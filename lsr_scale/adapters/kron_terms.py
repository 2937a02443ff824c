"""A matrix as a sum of Kronecker products: Van Loan's rearrangement, under which it is a matrix of low rank.

    M = sum_k L_k (x) R_k   <=>   rearranged(M) = sum_k vec(L_k) vec(R_k)^T

(Van Loan and Pitsianis, Approximation with Kronecker products, 1993). So the nearest sum of S products, in the
Frobenius norm, is the truncated SVD of the rearranged matrix.

Shape legend: S terms; L_k `[P, Q]`, R_k `[p, q]`, M `[P * p, Q * q]`, rearranged `[P * Q, p * q]`.
"""

import torch
from torch import Tensor

Size = tuple[int, int]

EXACT_UP_TO = 512  # rows or columns of a matrix whose singular vectors are computed exactly


def rearranged(matrix: Tensor, left: Size, right: Size) -> Tensor:
    """Return `[..., P * Q, p * q]` of `[..., P * p, Q * q]`."""
    blocks = matrix.unflatten(-1, (left[1], right[1])).unflatten(-3, (left[0], right[0]))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def arranged(matrix: Tensor, left: Size, right: Size) -> Tensor:
    """Return `[..., P * p, Q * q]` of `[..., P * Q, p * q]`: what undoes `rearranged`."""
    blocks = matrix.unflatten(-1, right).unflatten(-3, left)
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def nearest_terms(matrix: Tensor, left: Size, right: Size, terms: int) -> tuple[Tensor, Tensor]:
    """Return the nearest sum of Kronecker products to a matrix, as orthonormal left factors and what goes with them.

    Args:
        matrix: `[P * p, Q * q]`.
        left: Size of the left factors.
        right: Size of the right factors.
        terms: How many products, S.

    Returns:
        `[S, P, Q]`, of which the vectors are orthonormal, and `[S, p, q]`, the largest first; zeros where S is more
        than the rank that the rearranged matrix can have.
    """
    u, values, v = _svd(rearranged(matrix, left, right))
    count = min(terms, len(values))
    lefts, rights = matrix.new_zeros(terms, *left), matrix.new_zeros(terms, *right)
    lefts[:count] = u[:, :count].T.unflatten(-1, left)
    rights[:count] = (values[:count, None] * v[:count]).unflatten(-1, right)
    return lefts, rights


def leading_singular(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values of a matrix: left `[m, count]`, `[count]`, right `[count, n]`.

    Large matrices are decomposed in a subspace of 4 * count columns found by four iterations, as LoRA-GA's authors do.
    The largest element of each right vector is positive.

    Args:
        matrix: `[m, n]`.
        count: How many, at most m and n.
        generator: For the subspace's start, on the CPU.
    """
    if min(matrix.shape) <= max(EXACT_UP_TO, 4 * count):
        u, values, v = _svd(matrix)
        return u[:, :count], values[:count], v[:count]
    start = torch.randn(matrix.shape[1], 4 * count, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, values, v = _svd(basis.mT @ matrix)
    return basis @ u[:, :count], values[:count], v[:count]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced SVD, with the largest element of each right vector positive.

    Otherwise signs are as rounding has them, and a sum of Kronecker products near rows of some signs is not one near
    those of others.
    """
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    return u * signs.mT, values, v * signs
