"""LoRA-RITE (arXiv 2410.20625): adaptive steps of a pair that depend on its product alone.

For `up = Q_U R_U` and `down^T = Q_D R_D`, each an orthonormal basis times an `[r, r]` matrix, the unmagnified gradient
of `up` is `g_up R_D^+`, which is the gradient of the product times Q_D: it depends on the product but for a rotation of
the basis. Of it, for `up` (and for `down` alike, the other basis in place of Q_D):

    P = Q_D(t)^T Q_D(t-1)                                    from the last step's basis to this one's
    V = beta2 P V P^T + (1 - beta2) g^T g / rows             [r, r]
    rho = beta2 (rho + max_i(lambda_i(V) - lambda_i(P V P^T)))     what the change of basis lost: the escaped mass
    M = beta1 M P^T + (1 - beta1) g (V + rho I)^(-1/2)
    up -= lr M R_D^(-T)

Decays are bias-corrected as Adam's moments are. V is a mean over rows, so that the root mean square of M is about 1,
and rates are like Adam's. The paper takes bases by a QR decomposition; any orthonormal basis of the same columns gives
the same step, and here it is that of the Gram matrix's eigenvectors: one batched decomposition of `[r, r]` for both
sides of all modules, and another one for V and `P V P^T`. Where a factor has no full rank, as `up` at its zero start,
inverses are pseudo-inverses: directions that it lacks do not move the other one.

State: a moment, a basis, V and rho of each side: twice the pair, whatever its factors are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsr_scale.training.optimizers.eigh import eigh
from lsr_scale.training.optimizers.kron_side import gram, symmetric_roots
from lsr_scale.training.optimizers.pair_optimizer import PairOptimizer, bias_corrected
from lsr_scale.training.optimizers.sides import NAMES, Part, Sides
from lsr_scale.training.optimizers.stacks import State, Step, bound_stack


@dataclass
class Moments:
    """The state of sides, by group or of all, in order.

    Attributes:
        bases: `[n, dim, r]` of each group: Q of its rows at the last step.
        moments: Alike, M of its rows.
        second: `[2n, r, r]`, V.
        escaped: `[2n]`, rho.
        values: `[2n, r]`, float64, the eigenvalues of V: they follow from it, and are kept for the next step.
    """

    bases: list[Tensor]
    moments: list[Tensor]
    second: Tensor
    escaped: Tensor
    values: Tensor

    def of(self, part: Part | None) -> "Moments":
        """Return those of some sides; of all of them, if not told which."""
        if part is None:
            return self
        bases, moments = (
            [of_group[group][rows] for group, rows in zip(part.groups, part.index, strict=True)]
            for of_group in (self.bases, self.moments)
        )
        return Moments(bases, moments, *(of[part.numbers] for of in (self.second, self.escaped, self.values)))

    def update(self, part: Part | None, new: "Moments") -> None:
        """Set those of some sides."""
        if part is None:
            stacks = [*self.bases, *self.moments, self.second, self.escaped]
            torch._foreach_copy_(stacks, [*new.bases, *new.moments, new.second, new.escaped])
            self.values = new.values
            return
        for index, (group, rows) in enumerate(zip(part.groups, part.index, strict=True)):
            self.bases[group][rows] = new.bases[index]
            self.moments[group][rows] = new.moments[index]
        self.second[part.numbers], self.escaped[part.numbers] = new.second, new.escaped
        self.values[part.numbers] = new.values


class LoraRite(PairOptimizer):
    """LoRA-RITE; see the equations above."""

    saved_as = "LoraRite"

    def __init__(self, *args: Any, escaped_mass: bool = True, **kwargs: Any) -> None:
        """Take what every optimizer of pairs takes.

        Args:
            escaped_mass: Add rho to V; without, it is 0.
        """
        super().__init__(*args, **kwargs)
        self.escaped_mass = escaped_mass

    def begin(self, sides: Sides, states: Mapping[int, State], like: Tensor) -> Moments:
        """Return the pairs' state; those that begin have moments of zero, whatever the basis."""
        owners = [states[place.pair] for place in sides.places]
        names = [place.name for place in sides.places]
        rank = sides.groups[0].size[0]
        second = bound_stack(owners, [f"{name}_second" for name in names], like.new_zeros(rank, rank))
        escaped = bound_stack(owners, [f"{name}_escaped" for name in names], like.new_zeros(()))
        bases, moments = [], []
        for group in sides.groups:
            of_group = [states[place.pair] for place in group.places]
            zero = like.new_zeros(group.size[1], rank)
            # a side's basis is that in which the other one's moments are
            others = [f"{NAMES[place.name == 'down']}_basis" for place in group.places]
            bases.append(bound_stack(of_group, others, zero))
            moments.append(bound_stack(of_group, [f"{place.name}_moment" for place in group.places], zero))
        return Moments(bases, moments, second, escaped, eigh(second.double())[0].clone())

    def row_steps(self, step: Step, state: Moments) -> list[Tensor]:
        """Return the steps `R^-1 M^T`, R the other side's; the scaling drops out."""
        group, other, counts = self.param_groups[0], step.sides.other, step.sides.counts
        old = state.of(step.part)
        dtype = old.second.dtype
        vectors, _, inverse_roots = symmetric_roots(torch.cat([gram(rows) for rows in step.rows]))
        inverses = (vectors * inverse_roots[:, None, :]).to(dtype)  # R^+
        bases = [torch.bmm(rows.mT, own) for rows, own in zip(step.rows, inverses.split(counts), strict=True)]  # Q
        turns = [torch.bmm(new.mT, before) for new, before in zip(bases, old.bases, strict=True)]
        # of each side what its moments are in: the other one's
        inverses, turn = inverses[other], torch.cat(turns)[other]
        gradients = [torch.bmm(g.mT, own) for g, own in zip(step.gradients, inverses.split(counts), strict=True)]
        squares = torch.cat([torch.bmm(one.mT, one) for one in gradients]) / step.sides.dims
        beta1, beta2 = (step.of_sides(lambda count, beta=beta: bias_corrected(beta, count)) for beta in group["betas"])
        turned = torch.bmm(torch.bmm(turn, old.second), turn.mT)
        second = torch.lerp(turned, squares, 1 - beta2)
        if self.escaped_mass:
            both = _symmetric(torch.cat([turned, second]))
            second = both[len(turned) :]
            values, vectors = eigh(both.double())
            of_turned, values, vectors = values[: len(turned)], values[len(turned) :], vectors[len(turned) :]
            lost = (old.values - of_turned).amax(-1, keepdim=True).clamp_min(0)
            escaped = ((old.escaped[:, None] + lost)[..., None] * beta2).to(dtype)[:, 0, 0]
        else:
            second, escaped = _symmetric(second), old.escaped
            values, vectors = eigh(second.double())
        roots = (values.clamp_min(0) + escaped[:, None]).sqrt() + group["eps"]
        root = torch.bmm(vectors * ((1 - beta1) / roots[..., None]).mT, vectors.mT).to(dtype)
        decayed = turn * beta1
        of_groups = zip(old.moments, decayed.split(counts), gradients, root.split(counts), strict=True)
        moments = [torch.baddbmm(torch.bmm(before, p.mT), g, whitened) for before, p, g, whitened in of_groups]
        state.update(step.part, Moments(bases, moments, second, escaped, values))
        rated = (inverses * group["lr"]).split(counts)
        return [torch.bmm(inverse, moment.mT) for inverse, moment in zip(rated, moments, strict=True)]


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
