"""LSR-Adapt (arXiv 2502.13568): both low-rank matrices of LoRA as sums of Kronecker products.

    dW = scaling * (sum_k A_k^1 (x) A_k^2) (sum_k B_k^1 (x) B_k^2)

The sums come first, then the product: all `separation_rank^2` cross terms. `up` is the first sum, `[out, rank]`, and
`down` the second, `[rank, in]`, so the update is a LoRA of that rank whose matrices have few parameters.

Shape legend: S separation_rank; upper case is the left factor's share of a dimension, lower case the right one's:
in = I*i, out = O*o, rank = R*r (the split of the rank may differ between the two sides).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lsr_scale.adapters.factorize import balanced_split, divisors
from lsr_scale.adapters.kron_terms import leading_singular, nearest_terms
from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, Pair, Params, Shapes, option, register
from lsr_scale.errors import UserError
from lsr_scale.kernels.backend import use_triton
from lsr_scale.kernels.kron_sum import kron_sum
from lsr_scale.option_checks import check_start

PAPER_SCALING = 4096.0  # alpha 8192 over factor rank 2 in the authors' code

GRADIENT_ROUNDS = 4  # of `init: gradient`

# a side so many times larger than its dense form is refused as a typo; less is warned of (`oversized_sides`)
MAX_OVERSIZE = 16


@dataclasses.dataclass
class LsrConfig(AdapterConfig):
    """Options of LSR-Adapt; `alpha` is 2 * rank by default, or 4096 * rank (the authors' scaling) with init 'paper'."""

    rank: int = option(16, "Rank of the update.")
    separation_rank: int = option(16, "How many Kronecker products are summed on each side.")
    separation_rank_pattern: dict[str, int] = option(dict, "Separation rank by module.")
    left_in: int | None = option(None, "Left factor's share of in_features; the most balanced split by default.")
    left_out: int | None = option(None, "Left factor's share of out_features; the most balanced split by default.")
    left_rank: int | None = option(None, "Left factor's share of the rank; the larger dimension takes the smaller one.")
    left_in_pattern: dict[str, int] = option(dict, "left_in by module.")
    left_out_pattern: dict[str, int] = option(dict, "left_out by module.")
    left_rank_pattern: dict[str, int] = option(dict, "left_rank by module.")
    term_weights: bool = option(False, "Train a weight per term and side (the paper's lambdas); folded in otherwise.")
    init: Literal["zero", "paper", "gradient"] = option(
        "zero",
        "zero: dW = 0 at the start; paper: every factor 0.01 * N(0, 1); gradient: dW = 0, in the directions of the "
        "loss's gradient.",
    )
    init_rows: int = option(64, "With init: gradient, of how many training rows (or packed sequences) the gradient is.")

    def __post_init__(self) -> None:
        """Validate, and fill in alpha."""
        super().__post_init__()
        check_start(self.init, ("zero", "paper", "gradient"), self.init_rows)
        terms = {"separation_rank": self.separation_rank, **self.separation_rank_pattern}
        for name, value in terms.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected a separation rank, an integer >= 1, got {value!r}")
        if self.alpha is None:
            self.alpha = PAPER_SCALING * self.rank if self.init == "paper" else 2.0 * self.rank


def _split(size: int, left: int | None, dimension: str, option_name: str) -> tuple[int, int]:
    """Return `(left, right)` of a dimension, by the option if set, else the most balanced one."""
    if left is None:
        pair = balanced_split(size)
        if pair[1] == 1 and size > 1:
            raise UserError(
                f"{dimension}={size} has no useful split into two factors; leave the module out with exclude_modules, "
                f"or accept the trivial one with {option_name}_pattern: {{<module>: 1}}"
            )
        return pair
    if left < 1 or size % left:
        raise UserError(f"{option_name}={left} must divide {dimension}={size}; one of {divisors(size)} does")
    return left, size // left


def _side_splits(
    size: int, dimension: str, config: LsrConfig, left: int | None, option_name: str
) -> tuple[int, int, int, int]:
    """Return `(left, right, left_rank, right_rank)` of one side."""
    left_size, right_size = _split(size, left, dimension, option_name)
    if config.left_rank is None:
        larger, smaller = balanced_split(config.rank)
        left_rank, right_rank = (smaller, larger) if left_size >= right_size else (larger, smaller)
    else:
        left_rank, right_rank = _split(config.rank, config.left_rank, "rank", "left_rank")
    return left_size, right_size, left_rank, right_rank


def _kron_sum(left: Tensor, right: Tensor) -> Tensor:
    """Return `sum_k left_k (x) right_k`: `[..., S, M, N]` and `[..., S, m, n]` to `[..., M*m, N*n]`."""
    summed = torch.einsum("...sMN,...smn->...MmNn", left, right)
    return summed.flatten(-2).flatten(-3, -2)


@register
class Lsr(AdapterMethod):
    """LSR-Adapt."""

    name = "lsr"
    prefix = "lsr_"
    config_class = LsrConfig
    parameter_names = ("down_left", "down_right", "up_left", "up_right", "down_weight", "up_weight")
    sides = ("down", "up")

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: LsrConfig) -> Shapes:
        """Return the factors' shapes; raise UserError where a size cannot be split, or the terms are absurdly many."""
        if config.rank > min(in_features, out_features):
            raise UserError(
                f"rank={config.rank} is larger than the smaller dimension of the layer, {in_features} -> "
                f"{out_features}; lower rank, or set rank_pattern for this module"
            )
        terms = config.separation_rank
        left_in, right_in, left_rank, right_rank = _side_splits(
            in_features, "in_features", config, config.left_in, "left_in"
        )
        shapes: Shapes = {
            "down_left": (terms, left_rank, left_in),
            "down_right": (terms, right_rank, right_in),
        }
        left_out, right_out, left_rank, right_rank = _side_splits(
            out_features, "out_features", config, config.left_out, "left_out"
        )
        shapes |= {"up_left": (terms, left_out, left_rank), "up_right": (terms, right_out, right_rank)}
        for side, size in (("down", in_features), ("up", out_features)):
            per_term = sum(math.prod(shapes[f"{side}_{half}"][1:]) for half in ("left", "right"))
            max_terms = MAX_OVERSIZE * size * config.rank // per_term
            if terms > max_terms:
                raise UserError(
                    f"separation_rank={terms} gives the {side} side {terms * per_term:,} parameters, more than "
                    f"{MAX_OVERSIZE} times its dense form's {size * config.rank:,}; lower separation_rank to at most "
                    f"{max(1, max_terms)}, better to {max(1, max_terms // MAX_OVERSIZE)} or less"
                )
        if config.term_weights:
            shapes |= {"down_weight": (terms,), "up_weight": (terms,)}
        return shapes

    @staticmethod
    def init_parameters(params: Params, config: LsrConfig) -> None:
        """Fill the factors: dW = 0 with a gradient ('zero'), or 0.01 * randn everywhere ('paper')."""
        for name in ("down_weight", "up_weight"):
            if name in params:
                params[name].fill_(1.0)
        factors = [params[name] for name in ("down_left", "down_right", "up_left", "up_right")]
        if config.init == "paper":
            for factor in factors:
                factor.normal_(0.0, 0.01)
            return
        down_left, down_right, up_left, up_right = factors
        terms = down_left.shape[0]
        in_features = down_left.shape[-1] * down_right.shape[-1]
        # a sum of S products of two N(0, sigma^2) has variance S sigma^4 = 1 / in, that of LoRA's (Gaussian) A
        sigma = (terms * in_features) ** -0.25
        down_left.normal_(0.0, sigma)
        down_right.normal_(0.0, sigma)
        up_left.normal_(0.0, terms**-0.5)
        up_right.zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `(sum_k A_k^1 (x) A_k^2)(sum_k B_k^1 (x) B_k^2)` as the paper defines it."""
        sums = []
        for side in ("up", "down"):
            left, right = params[f"{side}_left"], params[f"{side}_right"]
            weight = params.get(f"{side}_weight", torch.ones_like(left[:, 0, 0]))
            terms = [w * torch.kron(a, b) for w, a, b in zip(weight, left, right, strict=True)]
            sums.append(torch.stack(terms).sum(0))
        up, down = sums
        return up @ down

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two sums: `down [rank, in]` and `up [out, rank]`."""
        pair = []
        for side in ("down", "up"):
            left = params[f"{side}_left"]
            if f"{side}_weight" in params:
                left = left * params[f"{side}_weight"][..., None, None]
            pair.append(_kron_sum(left, params[f"{side}_right"]))
        return pair[0], pair[1]

    @classmethod
    def start_from_gradient(cls, params: Params, gradient: Tensor, generator: torch.Generator) -> float:
        """Take the terms of the nearest product of two sums: down's, and up's left ones; up's right ones are zero.

        From the gradient's singular vectors each side is the nearest sum of S products, by turns for what the other
        one leaves; the best of some rounds counts.
        """
        down_left, down_right = params["down_left"], params["down_right"]
        up_left, up_right = params["up_left"], params["up_right"]
        sizes = [(one.shape[-2], one.shape[-1]) for one in (down_left, down_right, up_left, up_right)]
        terms, total = len(down_left), float(gradient.square().sum())
        rank = sizes[0][0] * sizes[1][0]
        _, values, rows = leading_singular(gradient, rank, generator)
        wanted, best, kept = values[:, None] * rows, total, None
        for _ in range(GRADIENT_ROUNDS):
            of_down = nearest_terms(wanted, sizes[0], sizes[1], terms)
            down = _kron_sum(*of_down)
            of_up = nearest_terms(gradient @ torch.linalg.pinv(down), sizes[2], sizes[3], terms)
            up = _kron_sum(*of_up)
            left = float((gradient - up @ down).square().sum())
            if kept is None or left < best:
                best, kept = left, (of_down, of_up)
            wanted = torch.linalg.pinv(up) @ gradient
        assert kept is not None
        (lefts, rights), (up_lefts, _) = kept
        norm = _kron_sum(down_left, down_right).norm() / _kron_sum(lefts, rights).norm()
        # factors of equal norms; terms that the gradient has no use for begin as they were drawn
        root = (norm * rights.norm() / lefts.norm()).sqrt()
        down_left.copy_(torch.where(lefts.any(-1, True).any(-2, True), lefts * root, down_left))
        down_right.copy_(rights * (norm / root))
        used = up_lefts.any(-1, True).any(-2, True)
        up_left.copy_(torch.where(used, up_lefts * (up_left.square().sum((-2, -1)).mean().sqrt()), up_left))
        up_right.zero_()
        return 1 - best / total

    @classmethod
    def kron_sides(cls, params: Mapping[str, Tensor]) -> dict[str, tuple[str | None, str]]:
        """Return the factors of both sums; weighted terms are products of three."""
        if "down_weight" in params:
            return {}
        return {side: (f"{side}_left", f"{side}_right") for side in cls.sides}

    @classmethod
    def materialize_rows(
        cls, stacks: Params, slots: Tensor, scale: Tensor, index: Tensor, dtype: torch.dtype, out: Pair | None = None
    ) -> Pair:
        """Return the scaled pairs of the rows of a batch; on a GPU in one pass over them a side."""
        left = stacks["down_left"]
        if not use_triton(left, left.dtype) or not use_triton(left, dtype) or "down_weight" in stacks:
            return super().materialize_rows(stacks, slots, scale, index, dtype, out)
        factors = [(stacks[f"{side}_left"], stacks[f"{side}_right"]) for side in ("down", "up")]
        if out is None:
            sizes = [[a * b for a, b in zip(left.shape[-2:], right.shape[-2:], strict=True)] for left, right in factors]
            down, up = (left.new_empty(len(index), left.shape[1], *size, dtype=dtype) for size in sizes)
        else:
            down, up = out
        slots, scales = slots[index], (None, scale[index].float())
        for (left, right), one_scale, made in zip(factors, scales, (down, up), strict=True):
            kron_sum(left, right, slots, one_scale, made)
        return down, up

    @classmethod
    def oversized_sides(cls, in_features: int, out_features: int, config: LsrConfig) -> list[str]:
        """Return a line for each side whose factors outnumber the dense `[rank, in]` or `[out, rank]` matrix."""
        shapes = cls.parameter_shapes(in_features, out_features, config)
        lines = []
        for side, size in (("down", in_features), ("up", out_features)):
            per_term = sum(shapes[f"{side}_{half}"][1] * shapes[f"{side}_{half}"][2] for half in ("left", "right"))
            dense = size * config.rank
            if config.separation_rank * per_term > dense:
                lines.append(
                    f"separation_rank={config.separation_rank} gives the {side} side of a rank-{config.rank} update "
                    f"{config.separation_rank * per_term} parameters, more than its dense form's {dense}; "
                    f"lower separation_rank to {max(1, dense // per_term)} or less"
                )
        return lines
