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
the same step, and here it is that of the Gram matrix's eigenvectors, whose computation is one batched product and one
batched decomposition of `[r, r]` for all modules of a shape. Where a factor has no full rank, as `up` at its zero
start, inverses are pseudo-inverses: directions that it lacks do not move the other one.

State: a moment, a basis, V and rho of each side: twice the pair, whatever its factors are.
"""

from typing import Any

import torch
from torch import Tensor

from lsr_scale.training.optimizers.kron_side import gram_roots
from lsr_scale.training.optimizers.pair_optimizer import PairOptimizer, State, bias_corrected


class LoraRite(PairOptimizer):
    """LoRA-RITE; see the equations above."""

    def __init__(self, *args: Any, escaped_mass: bool = True, **kwargs: Any) -> None:
        """Take what every optimizer of pairs takes.

        Args:
            escaped_mass: Add rho to V; without, it is 0.
        """
        super().__init__(*args, **kwargs)
        self.escaped_mass = escaped_mass

    def pair_steps(
        self, down: Tensor, up: Tensor, gradients: tuple[Tensor, Tensor], scaling: Tensor, states: list[State]
    ) -> tuple[Tensor, Tensor]:
        """Return the steps `(M_D R_U^-T)^T` and `M_U R_D^-T`; the scaling drops out."""
        sides = {"down": down, "up": up.mT}  # [n, r, in] and [n, r, out]
        bases, inverses = {}, {}
        for side, rows in sides.items():
            vectors, _, roots = gram_roots(rows)
            inverses[side] = (vectors * roots[..., None, :]).to(rows.dtype)  # R^+
            bases[side] = rows.mT @ inverses[side]  # Q
        of_down = self._preconditioned("down", gradients[0].mT @ inverses["up"], bases["up"], states)
        of_up = self._preconditioned("up", gradients[1] @ inverses["down"], bases["down"], states)
        return (of_down @ inverses["up"].mT).mT, of_up @ inverses["down"].mT

    def _preconditioned(self, side: str, gradient: Tensor, basis: Tensor, states: list[State]) -> Tensor:
        """Return the first moment M of unmagnified gradients `[n, rows, r]`, all moments brought to a new basis.

        Pairs that begin have moments of zero, whatever the basis.
        """
        group = self.param_groups[0]
        rank = gradient.shape[-1]
        zeros = {
            "basis": basis.new_zeros(basis.shape[1:]),
            "moment": gradient.new_zeros(gradient.shape[1:]),
            "second": gradient.new_zeros(rank, rank),
            "escaped": gradient.new_zeros(()),
        }
        old = {name: torch.stack([one.get(f"{side}_{name}", zero) for one in states]) for name, zero in zeros.items()}
        beta1, beta2 = (
            gradient.new_tensor([bias_corrected(beta, int(one["step"])) for one in states])[:, None, None]
            for beta in group["betas"]
        )
        turn = basis.mT @ old["basis"]
        turned = _symmetric(turn @ old["second"] @ turn.mT)
        escaped = old["escaped"]
        if self.escaped_mass:
            lost = torch.linalg.eigvalsh(old["second"].double()) - torch.linalg.eigvalsh(turned.double())
            escaped = beta2[:, 0, 0] * (escaped + lost.amax(-1).clamp_min(0).to(escaped.dtype))
        second = beta2 * turned + (1 - beta2) * _symmetric(gradient.mT @ gradient / gradient.shape[1])
        values, vectors = torch.linalg.eigh(second.double())
        roots = 1 / ((values.clamp_min(0) + escaped.double()[:, None]).sqrt() + group["eps"])
        root = ((vectors * roots[..., None, :]) @ vectors.mT).to(gradient.dtype)
        moment = beta1 * (old["moment"] @ turn.mT) + (1 - beta1) * (gradient @ root)
        new = {"basis": basis, "moment": moment, "second": second, "escaped": escaped}
        for name, stack in new.items():
            for state, value in zip(states, stack.unbind(), strict=True):
                state[f"{side}_{name}"] = value
        return moment


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
