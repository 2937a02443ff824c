"""LoRA-XS (arXiv 2405.17604): a small square matrix between two frozen ones, those of the weight's truncated SVD.

    dW = scaling * B R A,   W ~ U S V^T truncated to the rank,   A = S V^T [rank, in],   B = U [out, rank]

R `[rank, rank]` alone trains. The singular values stand on the input's side, as in the authors' code (which decomposes
W^T and has A = (U S)^T of that): R's columns then learn in proportion to what the weight does with its input, and its
rows are coordinates in the orthonormal basis U. PEFT's TinyLoRA puts their square roots on both sides.

A and B are made of the base's weight, dequantized where it is quantized, when the adapter is injected, and are not
saved: an adapter's file has R and the sketch by which another base is recognized (`peft/base_weight.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lsr_scale.adapters.peft import AdapterMethod, BaseWeightConfig, Params, Shapes, option, register
from lsr_scale.adapters.truncated_svd import truncated_svd
from lsr_scale.errors import UserError

PAPER_DEVIATION = 1e-5


@dataclasses.dataclass
class LoraXsConfig(BaseWeightConfig):
    """Options of LoRA-XS; for all seven linear layers of a 7B the authors' script has rank 32, alpha 64."""

    rank: int = option(16, "Rank of the truncated SVD; rank^2 parameters train a module.")
    init: Literal["zero", "paper"] = option("zero", "zero: dW = 0 at the start; paper: R = N(0, 1e-5^2).")

    def __post_init__(self) -> None:
        """Validate, and fill in alpha."""
        super().__post_init__()
        if self.init not in ("zero", "paper"):
            raise UserError(f"init: expected 'zero' or 'paper', got {self.init!r}")
        if self.alpha is None:
            self.alpha = 2.0 * self.rank


@register
class LoraXs(AdapterMethod):
    """LoRA-XS."""

    name = "lora_xs"
    prefix = "loraxs_"
    config_class = LoraXsConfig
    parameter_names = ("middle",)
    frozen_names = ("down", "up")
    cache_frozen = True

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: LoraXsConfig) -> Shapes:
        """Return the shape of R; raise UserError where the weight has no SVD of that rank."""
        if config.rank > min(in_features, out_features):
            raise UserError(
                f"rank={config.rank} is larger than the smaller dimension of the layer, {in_features} -> "
                f"{out_features}; lower rank, or set rank_pattern for this module"
            )
        return {"middle": (config.rank, config.rank)}

    @classmethod
    def frozen_shapes(cls, in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shapes of A and B."""
        return {"down": (config.rank, in_features), "up": (out_features, config.rank)}

    @classmethod
    def weight_factors(cls, weight: Tensor, config: Any) -> Params:
        """Return A and B, float64."""
        left, values, right = truncated_svd(weight, config.rank)
        return {"down": values[:, None] * right, "up": left}

    @staticmethod
    def init_parameters(params: Params, config: LoraXsConfig) -> None:
        """R zero, or as in the paper: either has a gradient, B^T (dL/dW) A^T."""
        if config.init == "paper":
            params["middle"].normal_(0.0, PAPER_DEVIATION)
        else:
            params["middle"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `B R A`."""
        return params["up"] @ params["middle"] @ params["down"]

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(A, B R)`."""
        return params["down"], params["up"] @ params["middle"]
