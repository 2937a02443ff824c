"""Kron-LoRA (arXiv 2508.01961): a small matrix times, in Kronecker's sense, a low-rank one.

    dW = scaling * A (x) (B1 B2),   A [left_out, left_in],   B1 [right_out, rank],   B2 [rank, right_in]

With left_in == left_out this is LoKr (arXiv 2309.14859) with one factored half. Its exact low-rank form follows from
the mixed-product rule, A (x) (B1 B2) = (A (x) B1)(I (x) B2) = (I (x) B1)(A (x) B2): the pair is as wide as the smaller
of left_in * rank and left_out * rank.

Shape legend: O, I the left factor's shares of out and in, o, i the right ones', r the rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lsr_scale.adapters.factorize import divisor_for_block, divisors
from lsr_scale.adapters.kron_terms import leading_singular, nearest_terms, rearranged
from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, Params, Shapes, option, register
from lsr_scale.errors import UserError
from lsr_scale.option_checks import check_start

# The paper's ablation finds blocks of about 200 rows best; with the hidden size, this gives its 16 for Mistral-7B and
# its 4 for DistilBERT.
BLOCK_SIZE = 200

GRADIENT_ROUNDS = 4  # of `init: gradient`


@dataclasses.dataclass
class KronLoraConfig(AdapterConfig):
    """Options of Kron-LoRA, by default the paper's: rank 8, alpha 32, dropout 0.1, left_in 2."""

    rank: int = option(8, "Rank of the right factor B1 B2.")
    alpha: float | None = option(32.0, "Numerator of the scaling alpha / rank.")
    dropout: float = option(0.1, "Dropout on the adapter's input, in training; 0 keeps the fast path.")
    left_in: int = option(2, "Columns of A; must divide in_features.")
    left_out: int | Literal["auto"] = option(
        "auto", "Rows of A; must divide out_features. auto: the divisor of the hidden size nearest hidden / 200."
    )
    init: Literal["zero", "gradient"] = option(
        "zero", "What A and B2 are at the start, where B1 is zero: random (zero), or the loss's gradient's (gradient)."
    )
    init_rows: int = option(64, "With init: gradient, of how many training rows (or packed sequences) the gradient is.")
    left_in_pattern: dict[str, int] = option(dict, "left_in by module.")
    left_out_pattern: dict[str, int] = option(dict, "left_out by module.")

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_start(self.init, ("zero", "gradient"), self.init_rows)
        if self.alpha is None:
            self.alpha = 32.0
        if self.left_out != "auto" and not isinstance(self.left_out, int):
            raise UserError(f"left_out: expected an integer or 'auto', got {self.left_out!r}")


def _right_size(size: int, left: int, dimension: str, option_name: str) -> int:
    if not isinstance(left, int) or left < 1 or size % left:
        raise UserError(
            f"{option_name}={left} must divide {dimension}={size}; set {option_name}_pattern: {{<module>: n}} with n "
            f"one of {divisors(size)}, or leave the module out with exclude_modules"
        )
    return size // left


@register
class KronLora(AdapterMethod):
    """Kron-LoRA."""

    name = "kron_lora"
    prefix = "kron_"
    config_class = KronLoraConfig
    parameter_names = ("left", "right_up", "right_down")

    @classmethod
    def prepare_config(cls, config: KronLoraConfig, hidden_size: int | None) -> None:
        """Resolve `left_out: auto` by the hidden size, one value for the whole model as in the paper."""
        if config.left_out == "auto" and hidden_size is not None:
            config.left_out = divisor_for_block(hidden_size, BLOCK_SIZE)

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: KronLoraConfig) -> Shapes:
        """Return the factors' shapes; raise UserError where a split does not divide or the rank is too large."""
        left_out = divisor_for_block(out_features, BLOCK_SIZE) if config.left_out == "auto" else config.left_out
        right_in = _right_size(in_features, config.left_in, "in_features", "left_in")
        right_out = _right_size(out_features, left_out, "out_features", "left_out")
        if config.rank > min(right_in, right_out):
            raise UserError(
                f"rank={config.rank} is larger than the smaller dimension of the right factor, {right_in} -> "
                f"{right_out}; lower rank, or set rank_pattern for this module"
            )
        return {
            "left": (left_out, config.left_in),
            "right_up": (right_out, config.rank),
            "right_down": (config.rank, right_in),
        }

    @staticmethod
    def init_parameters(params: Params, config: KronLoraConfig) -> None:
        """A and B2 Kaiming-uniform (a = sqrt 5, as LoRA's A), B1 zero: dW = 0 with a gradient."""
        del config
        nn.init.kaiming_uniform_(params["left"], a=math.sqrt(5))
        nn.init.kaiming_uniform_(params["right_down"], a=math.sqrt(5))
        params["right_up"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `A (x) (B1 B2)`."""
        return torch.kron(params["left"], params["right_up"] @ params["right_down"])

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(I (x) B2, A (x) B1)` or `(A (x) B2, I (x) B1)`, whichever is narrower."""
        left, right_up, right_down = params["left"], params["right_up"], params["right_down"]
        left_out, left_in = left.shape[-2:]
        if left_in <= left_out:
            eye = torch.eye(left_in, dtype=left.dtype, device=left.device)
            down, up = _kron(eye, right_down), _kron(left, right_up)
        else:
            eye = torch.eye(left_out, dtype=left.dtype, device=left.device)
            down, up = _kron(left, right_down), _kron(eye, right_up)
        return down, up

    @classmethod
    def start_from_gradient(cls, params: Params, gradient: Tensor, generator: torch.Generator) -> float:
        """Take A and B2 of the nearest `A (x) (B1 B2)`; B1 is zero.

        The nearest Kronecker product, then by turns the nearest B of the rank for that A, and the nearest A for that B:
        each step is exact, so that the error never grows.
        """
        left, down = params["left"], params["right_down"]
        left_size, right_size = (left.shape[0], left.shape[1]), (len(params["right_up"]), down.shape[1])
        blocks = rearranged(gradient, left_size, right_size)
        a = nearest_terms(gradient, left_size, right_size, 1)[0].flatten()
        for _ in range(GRADIENT_ROUNDS):
            u, values, rows = leading_singular((a @ blocks).unflatten(-1, right_size), len(down), generator)
            a = torch.nn.functional.normalize(blocks @ ((u * values) @ rows).flatten(), dim=0)
        _, values, rows = leading_singular((a @ blocks).unflatten(-1, right_size), len(down), generator)
        left.copy_(a.view_as(left) * left.norm())
        down.copy_(rows * (down.norm() / rows.norm()))
        params["right_up"].zero_()
        return float(values.square().sum() / gradient.square().sum())

    @classmethod
    def kron_sides(cls, params: Mapping[str, Tensor]) -> dict[str, tuple[str | None, str]]:
        """Return the factors of `materialize`'s two products."""
        left_out, left_in = params["left"].shape[-2:]
        if left_in <= left_out:
            return {"down": (None, "right_down"), "up": ("left", "right_up")}
        return {"down": ("left", "right_down"), "up": (None, "right_up")}


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of the last two dimensions, over broadcast leading ones."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)
