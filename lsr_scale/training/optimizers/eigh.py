"""Eigendecompositions of many small symmetric matrices: of all modules' in one call.

On a GPU `torch.linalg.eigh` decomposes stacks up to 32 x 32 in one kernel, larger matrices one after the other, and the
host waits for either. Above that a block Jacobi method is of the batched kernel's calls alone: blocks of 16 rows are
paired as in a tournament, each pair's 32 x 32 part is decomposed, and its eigenvectors turn the whole matrix, until
nothing off the diagonal is left. Numbers need no call.
"""

import torch
from torch import Tensor

BATCHED_UP_TO = 32  # rows of matrices that a GPU decomposes in one kernel
BLOCK = BATCHED_UP_TO // 2
TOLERANCE = 1e-15  # of what is off the diagonal, beside the whole matrix: what rounding leaves anyway
MOST_SWEEPS = 30


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues `[n, r]`, ascending, and eigenvectors `[n, r, r]`, as `torch.linalg.eigh` does.

    Args:
        matrices: `[n, r, r]`, symmetric, float64.
    """
    size = matrices.shape[-1]
    if size == 1:
        return matrices[..., 0], torch.ones_like(matrices)
    if size <= BATCHED_UP_TO or not matrices.is_cuda:
        return torch.linalg.eigh(matrices)
    return eigh_by_blocks(matrices)


def eigh_by_blocks(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `eigh` does, by decompositions of 32 x 32."""
    number, size = matrices.shape[0], matrices.shape[-1]
    pairs = -(-size // BATCHED_UP_TO)
    padded = pairs * BATCHED_UP_TO
    norm = torch.linalg.matrix_norm(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)[:, None]
    # rows that are added stay apart: they have the largest eigenvalue, and go last
    work = torch.diag_embed((2 * norm).expand(number, padded))
    work[:, :size, :size] = matrices
    vectors = torch.eye(padded, dtype=work.dtype, device=work.device).expand_as(work)
    order = _next_round(2 * pairs, work.device)
    for _ in range(MOST_SWEEPS):
        for _ in range(max(1, 2 * pairs - 1)):
            parts = work.unflatten(-1, (pairs, -1)).unflatten(-3, (pairs, -1)).diagonal(dim1=-4, dim2=-2)
            _, turns = torch.linalg.eigh(parts.movedim(-1, 1).flatten(0, 1))
            # what is most in a block stays there: sorted by eigenvalues some rows would never meet
            stays = turns[:, :BLOCK].square().sum(1).argsort(-1, descending=True)
            turns = turns.gather(-1, stays[:, None, :].expand_as(turns))
            turn = torch.zeros_like(work)
            on_diagonal = turn.unflatten(-1, (pairs, -1)).unflatten(-3, (pairs, -1)).diagonal(dim1=-4, dim2=-2)
            on_diagonal.copy_(turns.unflatten(0, (number, pairs)).movedim(1, -1))
            turn = turn[:, :, order]
            work, vectors = turn.mT @ work @ turn, vectors @ turn
        off = torch.linalg.matrix_norm(work - torch.diag_embed(work.diagonal(dim1=-2, dim2=-1)))
        if bool((off <= TOLERANCE * padded * norm[:, 0]).all()):
            break
    values, places = work.diagonal(dim1=-2, dim2=-1).sort(-1)
    vectors = vectors.gather(-1, places[:, None, :].expand_as(vectors))
    return values[:, :size], vectors[:, :size, :size]


def _next_round(blocks: int, device: torch.device) -> Tensor:
    """Return the columns in the order in which neighbouring blocks are the next round's pairs.

    All blocks but the first go round, as players of a tournament do between the tables.
    """
    tops, bottoms = list(range(0, blocks, 2)), list(range(1, blocks, 2))
    after = [tops[0], bottoms[0], *tops[1:]][: len(tops)], [*bottoms[1:], tops[-1]]
    order = torch.tensor(after).T.flatten() if blocks > 2 else torch.arange(blocks)
    return (order[:, None] * BLOCK + torch.arange(BLOCK)).flatten().to(device)
