"""SLoRA, NLoRA and IntTune (arXiv 2502.14482): a small square matrix between LoRA's two.

    dW = scaling * B N A,   A [rank, in],   N [rank, rank],   B [out, rank]

With `init: zero` (SLoRA) B starts at zero and all three train. With `init: nystrom` (NLoRA) they start as parts of the
weight, A_0 = W[:rank, :], N_0 = W[:rank, :rank] and B_0 = W[:, :rank], as in the authors' code, whose pseudoinverse of
N_0, which Nystrom's approximation of W has there, is commented out. The authors leave that start in the function that
trains; here it is subtracted, on every base, quantized or not, by a frozen term:

    train: all      dW = scaling * (B N A - B_0 N_0 A_0)     exactly of rank 2 * rank
    train: middle   dW = scaling * B_0 (N - N_0) A_0         IntTune: N alone trains

so the function starts as the base's own. The weights of the base stay as they are. What is made of them is not saved:
an adapter's file has what trains, and the sketch by which another base is recognized (`peft/base_weight.py`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsr_scale.adapters.peft import AdapterMethod, BaseWeightConfig, Params, Shapes, option, register
from lsr_scale.errors import UserError


@dataclasses.dataclass
class SloraConfig(BaseWeightConfig):
    """Options of SLoRA, NLoRA (`init: nystrom`) and IntTune (`train: middle` too)."""

    init: Literal["zero", "nystrom"] = option(
        "zero", "zero: B = 0, the others random; nystrom: parts of the base's weight, their product subtracted."
    )
    train: Literal["all", "middle"] = option(
        "all", "all: A, N and B; middle: N alone, rank^2 parameters a module, with init: nystrom."
    )

    def __post_init__(self) -> None:
        """Validate, and fill in alpha."""
        super().__post_init__()
        if self.init not in ("zero", "nystrom"):
            raise UserError(f"init: expected 'zero' or 'nystrom', got {self.init!r}")
        if self.train not in ("all", "middle"):
            raise UserError(f"train: expected 'all' or 'middle', got {self.train!r}")
        if self.train == "middle" and self.init != "nystrom":
            raise UserError("train: middle, where B stays zero with init: zero, trains nothing; set init: nystrom")
        if self.alpha is None:
            self.alpha = 2.0 * self.rank


@register
class Slora(AdapterMethod):
    """SLoRA, NLoRA and IntTune."""

    name = "slora"
    prefix = "structured_"
    config_class = SloraConfig
    parameter_names = ("down", "middle", "up")
    frozen_names = ("start_down", "start_middle", "start_up")

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: SloraConfig) -> Shapes:
        """Return the shapes of what trains; raise UserError where the rank is larger than the layer."""
        rank = config.rank
        if rank > min(in_features, out_features):
            raise UserError(
                f"rank={rank} is larger than the smaller dimension of the layer, {in_features} -> "
                f"{out_features}; lower rank, or set rank_pattern for this module"
            )
        if config.train == "middle":
            return {"middle": (rank, rank)}
        return {"down": (rank, in_features), "middle": (rank, rank), "up": (out_features, rank)}

    @classmethod
    def frozen_shapes(cls, in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shapes of A_0, N_0 and B_0; none without `init: nystrom`."""
        rank = config.rank
        if config.init == "zero":
            return {}
        return {"start_down": (rank, in_features), "start_middle": (rank, rank), "start_up": (out_features, rank)}

    @classmethod
    def weight_factors(cls, weight: Tensor, config: Any) -> Params:
        """Return A_0, N_0 and B_0, as frozen factors and, where all of them train, as their starts."""
        parts = {"down": weight[: config.rank], "up": weight[:, : config.rank]}
        parts["middle"] = parts["down"][:, : config.rank]
        names = ("middle",) if config.train == "middle" else cls.parameter_names
        return {f"start_{name}": part for name, part in parts.items()} | {name: parts[name] for name in names}

    @staticmethod
    def init_parameters(params: Params, config: SloraConfig) -> None:
        """A and N Kaiming-uniform (a = sqrt 5, as LoRA's A), B zero: dW = 0 with a gradient."""
        del config
        for name in ("down", "middle"):
            if name in params:
                nn.init.kaiming_uniform_(params[name], a=math.sqrt(5))
        if "up" in params:
            params["up"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `B N A` less the start, where there is one."""
        start = {name.removeprefix("start_"): value for name, value in params.items() if name.startswith("start_")}
        now = {**start, **{name: value for name, value in params.items() if not name.startswith("start_")}}
        delta = now["up"] @ now["middle"] @ now["down"]
        return delta - start["up"] @ start["middle"] @ start["down"] if start else delta

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(A, B N)`, with the start `([A; A_0], [B N, -B_0 N_0])`, of N alone `(A_0, B_0 (N - N_0))`."""
        if "up" not in params:
            return params["start_down"], params["start_up"] @ (params["middle"] - params["start_middle"])
        down, up = params["down"], params["up"] @ params["middle"]
        if "start_up" in params:
            start = params["start_up"] @ params["start_middle"]
            down, up = torch.cat([down, params["start_down"]], -2), torch.cat([up, -start], -1)
        return down, up
