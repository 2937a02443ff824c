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

import torch
from torch import Tensor

from lsr_scale.training.optimizers.kron_side import gram_roots
from lsr_scale.training.optimizers.pair_optimizer import PairOptimizer, State

Roots = tuple[Tensor, Tensor, Tensor]
TINY = torch.finfo(torch.float64).tiny


class LoraPro(PairOptimizer):
    """LoRA-Pro with Adam; see the equations above."""

    def pair_steps(
        self, down: Tensor, up: Tensor, gradients: tuple[Tensor, Tensor], scaling: Tensor, states: list[State]
    ) -> tuple[Tensor, Tensor]:
        """Return the pair's share of Adam's step of the equivalent gradient."""
        of_down, of_up = gram_roots(down), gram_roots(up.mT)
        steps = []
        # one after the other: each has matrices of the weight's size
        for index, state in enumerate(states):
            pair = down[index], up[index]
            roots = [(one[0][index], one[1][index], one[2][index]) for one in (of_down, of_up)]
            s = scaling[index, 0, 0]
            nearest = nearest_pair(pair, (gradients[0][index], gradients[1][index]), s, roots[0], roots[1])
            step = self._adam(s * (pair[1] @ nearest[0] + nearest[1] @ pair[0]), state)
            of_pair = s * pair[1].mT @ step, s * step @ pair[0].mT
            size = ((of_pair[1].double() @ roots[0][0]) * roots[0][2]).square().sum() * self.param_groups[0]["lr"] ** 2
            damping = size / s**4 * len(pair[0]) / roots[0][1].sum().clamp_min(TINY)
            steps.append(nearest_pair(pair, of_pair, s, roots[0], roots[1], damping))
        downs, ups = zip(*steps, strict=True)
        return torch.stack(downs), torch.stack(ups)

    def _adam(self, gradient: Tensor, state: State) -> Tensor:
        """Return Adam's step for a gradient of the weight's size."""
        (beta1, beta2), eps = self.param_groups[0]["betas"], self.param_groups[0]["eps"]
        for name in ("weight_moment", "weight_second"):
            if name not in state:
                state[name] = torch.zeros_like(gradient)
        step = int(state["step"])
        state["weight_moment"].lerp_(gradient, 1 - beta1)
        state["weight_second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["weight_second"] / (1 - beta2**step)).sqrt_().add_(eps)
        return state["weight_moment"] / (1 - beta1**step) / root


def nearest_pair(
    pair: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    s: Tensor | float,
    of_down: Roots,
    of_up: Roots,
    damping: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return `(g_A [r, in], g_B [out, r])` of the equations above.

    Args:
        pair: down `[r, in]` and up `[out, r]`.
        gradients: Of both.
        s: The scaling.
        of_down: `gram_roots(down)`.
        of_up: `gram_roots(up^T)`.
        damping: mu.
    """
    down, up = pair
    (a, values_a, roots_a), (b, values_b, roots_b) = of_down, of_up
    inverse_down = ((a * roots_a.square()) @ a.mT).to(down.dtype)
    inverse_up = ((b * (roots_b.square() / (1 + damping * roots_b.square()))) @ b.mT).to(down.dtype)
    along = inverse_up @ gradients[0] / s**2
    # in the bases of eigenvectors the equation is one division an element
    right = b.mT @ (along @ down.mT).double() @ a
    sums = values_b[:, None] + values_a
    x = (b @ torch.where(sums > 0, -right / torch.where(sums > 0, sums, 1.0), 0.0) @ a.mT).to(down.dtype)
    across = gradients[1] @ inverse_down / s**2
    across = across - up @ (inverse_up @ (up.mT @ across))
    return along + x @ down, across - up @ x
