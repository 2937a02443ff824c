"""KronA (arXiv 2212.10650): one Kronecker product of two full matrices, an update of full rank.

    dW = alpha * A (x) B,   A [left_out, left_in],   B [right_out, right_in]

A baseline of both papers behind this package. There is no exact pair of small rank: the product is applied to the input
as two matrix products, `A X B^T` with X the input folded to `[left_in, right_in]`, and `dW` is never built.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsr_scale.adapters.factorize import balanced_split, divisors
from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, Params, Shapes, option, register
from lsr_scale.errors import UserError


@dataclasses.dataclass
class KronaConfig(AdapterConfig):
    """Options of KronA. It has no rank: its size follows from the splits, smallest where they are balanced."""

    rank: int = option(1, "KronA has none; leave it at 1.")
    alpha: float | None = option(1.0, "The factor on the update, the paper's s.")
    left_in: int | None = option(None, "Columns of A; must divide in_features; the most balanced split by default.")
    left_out: int | None = option(None, "Rows of A; must divide out_features; the most balanced split by default.")
    left_in_pattern: dict[str, int] = option(dict, "left_in by module.")
    left_out_pattern: dict[str, int] = option(dict, "left_out by module.")

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.rank != 1 or self.rank_pattern:
            raise UserError("rank: KronA has none (leave it at 1); left_out and left_in set its size")
        if self.alpha is None:
            self.alpha = 1.0


def _left_size(size: int, left: int | None, dimension: str, option_name: str) -> int:
    if left is None:
        return balanced_split(size)[1]
    if not isinstance(left, int) or left < 1 or size % left:
        raise UserError(
            f"{option_name}={left} must divide {dimension}={size}; set {option_name}_pattern: {{<module>: n}} with n "
            f"one of {divisors(size)}, or leave the module out with exclude_modules"
        )
    return left


@register
class Krona(AdapterMethod):
    """KronA."""

    name = "krona"
    prefix = "krona_"
    config_class = KronaConfig
    parameter_names = ("left", "right")

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: KronaConfig) -> Shapes:
        """Return the factors' shapes; raise UserError where a split does not divide."""
        left_in = _left_size(in_features, config.left_in, "in_features", "left_in")
        left_out = _left_size(out_features, config.left_out, "out_features", "left_out")
        return {"left": (left_out, left_in), "right": (out_features // left_out, in_features // left_in)}

    @staticmethod
    def init_parameters(params: Params, config: KronaConfig) -> None:
        """A Kaiming-uniform (a = sqrt 5, as LoRA's A), B zero: dW = 0 with a gradient."""
        del config
        nn.init.kaiming_uniform_(params["left"], a=math.sqrt(5))
        params["right"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `A (x) B`."""
        return torch.kron(params["left"], params["right"])

    @classmethod
    def delta_forward(cls, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return `A X B^T` flattened, `[..., out]`; of the two orders the one with fewer products."""
        left, right = params["left"].to(x.dtype), params["right"].to(x.dtype)
        (left_out, left_in), (right_out, right_in) = left.shape, right.shape
        folded = x.unflatten(-1, (left_in, right_in))
        if right_in * left_out * (left_in + right_out) <= right_out * left_in * (right_in + left_out):
            product = _matmul_2d(_matmul_2d(folded.mT, left).mT, right)
        else:
            product = _matmul_2d(_matmul_2d(folded, right).mT, left).mT
        return product.flatten(-2)


def _matmul_2d(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight^T` as one product of two matrices.

    How `matmul` folds a batch, and with it the rounding, depends on whether something requires a gradient: a loaded
    adapter would not be bit-equal to the trained one.
    """
    return (x.reshape(-1, x.shape[-1]) @ weight.T).unflatten(0, x.shape[:-1])
