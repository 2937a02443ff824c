"""The condition number of a sum of Kronecker products: how much its terms cancel, and guards against it.

    M = sum_k lambda_k A_k (x) B_k,  ||A_k|| = ||B_k|| = 1        gamma = (sum_k lambda_k^2)^(1/2) / ||M||

(LSR-Adapt, arXiv 2502.13568, definition 3.3, after Beylkin and Mohlenkamp 2005; Frobenius norms.) Rounding the factors
to a dtype of unit roundoff u changes M by about `gamma u ||M||`: terms that are orthogonal have gamma = 1, terms that
cancel a large one. With the lambdas folded into the factors, lambda_k = ||A_k|| ||B_k||, and

    ||M||^2 = sum_kl <A_k, A_l> <B_k, B_l>

takes the factors' Gram matrices only; M is never made. By definition gamma = 1 while M = 0.

Shape legend: S separation rank; `[..., S, m, n]` a side's left or right factors, leading dimensions for many modules.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsr_scale.adapters.peft import AdapterLinear

Guard = Literal["warn", "rescale", "fp32"]
# Twice bfloat16's unit roundoff. No module that the ablations trained had a gamma above 1.1, so a healthy run gets no
# warning, even with factors in bfloat16; factors in float16 are warned of from gamma 16 on, in float32 from 131,072.
TOLERANCE = 2.0**-7


def condition(left: Tensor, right: Tensor) -> Tensor:
    """Return gamma of `sum_k left_k (x) right_k`, float64.

    Args:
        left: `[..., S, M, N]`, any floating dtype.
        right: `[..., S, m, n]`.

    Returns:
        `[...]`, at least 1/sqrt(S); 1 where the sum is zero.
    """
    a, b = (factor.detach().double().flatten(-2) for factor in (left, right))
    grams = (a @ a.mT) * (b @ b.mT)  # [..., S, S]
    squares = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    # rounding in float64 bounds from below what cancellation leaves
    norm = grams.sum((-2, -1)).clamp_min(squares * torch.finfo(torch.float64).eps)
    return torch.where(squares > 0, (squares / norm.where(squares > 0, squares + 1)).sqrt(), torch.ones_like(squares))


def orthogonal_terms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same sum whose terms are orthogonal, so that gamma = 1, and of equal norm in pairs.

    By Van Loan's rearrangement the sum is the matrix `R = sum_k vec(A_k) vec(B_k)^T`; the terms of its singular value
    decomposition, from two thin QR and the SVD of an S x S core, are orthogonal. Computed in float64.

    Args:
        left: `[S, M, N]`.
        right: `[S, m, n]`.

    Returns:
        Both in the shapes and dtypes of the arguments; terms that the sum does not need are zero on the right and
        unchanged on the left, so that they still get a gradient.
    """
    q_left, r_left = torch.linalg.qr(left.detach().double().flatten(1).T)
    q_right, r_right = torch.linalg.qr(right.detach().double().flatten(1).T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = values.sqrt()
    new_left, new_right = (q_left @ u * root).T, (q_right @ v.T * root).T
    count = len(values)  # less than S where a side has fewer elements
    out_left, out_right = left.detach().clone(), torch.zeros_like(right)
    out_left[:count], out_right[:count] = (
        new.view(count, *like.shape[1:]).to(like.dtype) for new, like in ((new_left, left), (new_right, right))
    )
    return out_left, out_right


@dataclass(frozen=True)
class KroneckerSum:
    """One sum of one module: its factors, and the parameter of its terms' weights where those are trained."""

    module: str
    side: str  # "down" or "up"
    left: nn.Parameter
    right: nn.Parameter
    weight: nn.Parameter | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that the sum depends on."""
        return [self.left, self.right, *([] if self.weight is None else [self.weight])]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return both factors detached, the weights folded into the left one."""
        left = self.left.detach().float()
        return (left if self.weight is None else left * self.weight.detach()[:, None, None]), self.right.detach()


def kronecker_sums(model: nn.Module) -> list[KroneckerSum]:
    """Return every sum of Kronecker products among a model's active adapters: those of methods that have `sides`."""
    sums = []
    for module_name, module in model.named_modules():
        if not isinstance(module, AdapterLinear):
            continue
        for adapter in module.active_adapters:
            factors: Any = module.factors(adapter)
            for side in module.method_of(adapter).sides if factors else ():
                left, right, weight = (factors.get(f"{side}_{part}") for part in ("left", "right", "weight"))
                sums.append(KroneckerSum(module_name.removeprefix("base_model.model."), side, left, right, weight))
    return sums


@torch.no_grad()
def conditions(sums: list[KroneckerSum]) -> Tensor:
    """Return gamma of each sum, float64 on the CPU; sums of one shape are computed together.

    It is part of every log, for which the GPU waits, so the host makes a few calls for each shape, not for each sum.
    """
    groups: dict[Any, list[int]] = {}
    for index, one in enumerate(sums):
        alike = one.left.shape, one.right.shape, one.left.device, one.left.dtype, one.right.dtype, one.weight is None
        groups.setdefault(alike, []).append(index)
    computed = []
    for members in groups.values():
        some = [sums[index] for index in members]
        left = torch.stack([one.left.data for one in some]).float()
        weights = [one.weight.data for one in some if one.weight is not None]
        if weights:
            left = left * torch.stack(weights)[..., None, None]
        computed.append(condition(left, torch.stack([one.right.data for one in some]).float()))
    values = torch.empty(len(sums), dtype=torch.float64)
    values[[index for members in groups.values() for index in members]] = torch.cat([one.cpu() for one in computed])
    return values


# the unit roundoff of bfloat16, above those of the other dtypes that factors have
_LARGEST_ROUNDOFF = torch.finfo(torch.bfloat16).eps / 2


def ill_conditioned(sums: list[KroneckerSum], gammas: Tensor, tolerance: float) -> list[int]:
    """Return the indices of the sums that rounding to their factors' dtype changes by more than the tolerance."""
    suspects = (gammas * _LARGEST_ROUNDOFF > tolerance).nonzero().flatten().tolist()
    roundoff = {i: max(torch.finfo(p.dtype).eps / 2 for p in (sums[i].left, sums[i].right)) for i in suspects}
    return [i for i in suspects if float(gammas[i]) * roundoff[i] > tolerance]


@torch.no_grad()
def apply_guard(ill: KroneckerSum, guard: Guard, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Make an ill-conditioned sum robust to rounding, in place.

    Args:
        ill: The sum.
        guard: "rescale" writes the same sum with orthogonal terms of balanced factors, and drops their optimizer
            state. "fp32" casts factors and optimizer state to float32. "warn" does nothing.
        optimizer: The one that trains it, if any.
    """
    if guard == "warn":
        return
    state: Any = optimizer.state if optimizer is not None else {}
    if guard == "fp32":
        for parameter in ill.parameters:
            parameter.data = parameter.data.float()
            for name, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                    state[parameter][name] = value.float()
        return
    left, right = orthogonal_terms(*ill.factors())
    ill.left.copy_(left)
    ill.right.copy_(right)
    if ill.weight is not None:
        ill.weight.fill_(1.0)
    for parameter in ill.parameters:
        state.pop(parameter, None)
