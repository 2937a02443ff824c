"""KAdaptation (arXiv 2203.16329), one set of factors a module: a sum of Kronecker products of low-rank matrices.

    dW = scaling * sum_i (s_i t_i^T) (x) (U_i V_i),   i = 1 .. phm_dim
    s_i, t_i [phm_dim],   U_i [out / phm_dim, rank],   V_i [rank, in / phm_dim]

A baseline of the LSR-Adapt paper. Two departures from the authors' code, and from the paper's sharing of s and t over
layers: every module has its own factors, so that a module's update depends on nothing else; and U alone starts at
zero, since in the released code U and V both do, where neither they nor s and t ever get a gradient. By the
mixed-product rule each term is `(s_i (x) U_i)(t_i (x) V_i)`, so the sum is exactly of rank `phm_dim * rank`.

Shape legend: P phm_dim, n the terms (also phm_dim), r the rank.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsr_scale.adapters.factorize import divisors
from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, Params, Shapes, option, register
from lsr_scale.errors import UserError

RELEASED_SCALING = 160.0  # 5 * 128 / 4 in the authors' code
RELEASED_RANGE = 0.01  # s and t are drawn from U(-0.01, 0.01)


@dataclasses.dataclass
class KadaptationConfig(AdapterConfig):
    """Options of KAdaptation, by default the released ones: 32 terms of rank 1, scaling 160."""

    rank: int = option(1, "Rank of each right factor U_i V_i.")
    alpha: float | None = option(None, "Numerator of the scaling alpha / rank; 160 * rank by default.")
    phm_dim: int = option(32, "Number of terms and size of the left factors; must divide in_features and out_features.")
    phm_dim_pattern: dict[str, int] = option(dict, "phm_dim by module.")

    def __post_init__(self) -> None:
        """Validate, and fill in alpha."""
        super().__post_init__()
        for name, value in {"phm_dim": self.phm_dim, **self.phm_dim_pattern}.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.alpha is None:
            self.alpha = RELEASED_SCALING * self.rank


@register
class Kadaptation(AdapterMethod):
    """KAdaptation."""

    name = "kadaptation"
    prefix = "kadaptation_"
    config_class = KadaptationConfig
    parameter_names = ("left_up", "left_down", "right_up", "right_down")

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: KadaptationConfig) -> Shapes:
        """Return the factors' shapes; raise UserError where phm_dim does not divide or the rank is too large."""
        terms = config.phm_dim
        for size, dimension in ((in_features, "in_features"), (out_features, "out_features")):
            if size % terms:
                both = divisors(math.gcd(in_features, out_features))
                raise UserError(
                    f"phm_dim={terms} must divide {dimension}={size}; set phm_dim_pattern: {{<module>: n}} with n one "
                    f"of {both}, or leave the module out with exclude_modules"
                )
        right_in, right_out = in_features // terms, out_features // terms
        if config.rank > min(right_in, right_out):
            raise UserError(
                f"rank={config.rank} is larger than the smaller dimension of the right factors, {right_in} -> "
                f"{right_out}; lower rank, or set rank_pattern for this module"
            )
        return {
            "left_up": (terms, terms),
            "left_down": (terms, terms),
            "right_up": (terms, right_out, config.rank),
            "right_down": (terms, config.rank, right_in),
        }

    @staticmethod
    def init_parameters(params: Params, config: KadaptationConfig) -> None:
        """Draw s and t from U(-0.01, 0.01), each V_i Kaiming-uniform (a = sqrt 5); U zero: dW = 0 with a gradient."""
        del config
        nn.init.uniform_(params["left_up"], -RELEASED_RANGE, RELEASED_RANGE)
        nn.init.uniform_(params["left_down"], -RELEASED_RANGE, RELEASED_RANGE)
        for term in params["right_down"]:
            nn.init.kaiming_uniform_(term, a=math.sqrt(5))
        params["right_up"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the Kronecker products, term by term."""
        factors = zip(*(params[name] for name in Kadaptation.parameter_names), strict=True)
        terms = [torch.kron(torch.outer(s, t), up @ down) for s, t, up, down in factors]
        return torch.stack(terms).sum(0)

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `down`, whose rows are `t_i (x) V_i`, and `up`, whose columns are `s_i (x) U_i`."""
        # [..., n, r, P, in / P] and [..., P, out / P, n, r]
        down = params["left_down"][..., :, None, :, None] * params["right_down"][..., :, :, None, :]
        up = params["left_up"].mT[..., :, None, :, None] * params["right_up"].movedim(-3, -2)[..., None, :, :, :]
        return down.flatten(-2).flatten(-3, -2), up.flatten(-2).flatten(-3, -2)
