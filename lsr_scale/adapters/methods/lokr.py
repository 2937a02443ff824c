"""LoKr (arXiv 2309.14859), PEFT's own, under this package's option names: what Kron-LoRA generalizes.

With PEFT's defaults a linear layer's update is `alpha / rank * w1 (x) (w2_a w2_b)`: Kron-LoRA with PEFT's choice of the
split, which `left_in` and `left_out` of Kron-LoRA leave free. PEFT builds the dense update in every forward pass, and
cannot on a 4-bit base.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import Linear
from torch import Tensor, nn

from lsr_scale.adapters.peft import AdapterMethod, option
from lsr_scale.errors import UserError


@dataclasses.dataclass
class LokrOptions:
    """Options of LoKr; everything else stays at PEFT's default."""

    target_modules: list[str] | str | None = option(
        None, "Names (or one regular expression) of the modules to adapt, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = option(None, "Names (or one regular expression) of modules to leave out.")
    rank: int = option(8, "Rank of the right factor; full where this is half of its size or more.")
    alpha: float | None = option(None, "Numerator of the scaling alpha / rank; 2 * rank by default.")
    decompose_factor: int = option(-1, "Size of the left factor, both sides; -1 is the most balanced split.")
    decompose_both: bool = option(False, "Factor the left factor too, where it is large.")
    rank_pattern: dict[str, int] = option(dict, "Rank by module.")
    alpha_pattern: dict[str, float] = option(dict, "Alpha by module.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list, if layers_to_transform needs it.")
    modules_to_save: list[str] | None = option(None, "Modules fully trained and saved with the adapter.")

    def to_peft(self) -> LoKrConfig:
        """Return PEFT's config of the same meaning."""
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"rank: expected an integer >= 1, got {self.rank!r}")
        factor = self.decompose_factor
        if type(factor) is not int or (factor < 1 and factor != -1):
            raise UserError(f"decompose_factor: expected -1 or an integer >= 1, got {factor!r}")
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rank, alpha = shared.pop("rank"), shared.pop("alpha")
        return LoKrConfig(r=rank, alpha=2 * rank if alpha is None else alpha, **shared)


class LokrFactors(AdapterMethod):
    """The factors that PEFT saves of a linear layer's LoKr, not registered: PEFT trains it, exports read it as a pair.

    Each side is a matrix, `w1` or `w2`, or a product, `w1_a w1_b` or `w2_a w2_b`.
    """

    name = "lokr"
    prefix = "lokr_"
    parameter_names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")  # t2: convolutions only

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the factors' shapes as PEFT chooses them: full or a product, by rank and size."""
        base = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer = Linear(base, "default", config, r=config.r, alpha=config.alpha)
        containers = {name: getattr(layer, LokrFactors.prefix + name) for name in LokrFactors.parameter_names}
        return {name: tuple(value["default"].shape) for name, value in containers.items() if "default" in value}

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `w1 (x) w2`."""
        return torch.kron(*(params[side] if side in params else _product(params, side) for side in ("w1", "w2")))

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(down1 (x) down2, up1 (x) up2)` of the sides' own pairs: their ranks multiply."""
        if "t2" in params or any(value.dim() != 2 for value in params.values()):
            raise ValueError("they are a convolution's, and exports hold linear layers only")
        (down1, up1), (down2, up2) = (_side(params, side) for side in ("w1", "w2"))
        return torch.kron(down1, down2), torch.kron(up1, up2)


def _product(params: Mapping[str, Tensor], side: str) -> Tensor:
    return params[f"{side}_a"] @ params[f"{side}_b"]


def _side(params: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return the exact pair of a side, no wider than the side itself."""
    if side not in params:
        up, down = params[f"{side}_a"], params[f"{side}_b"]
        if up.shape[1] < min(up.shape[0], down.shape[1]):
            return down, up
    full = params[side] if side in params else _product(params, side)
    rows, columns = full.shape
    eye = torch.eye(min(rows, columns), dtype=full.dtype, device=full.device)
    return (full, eye) if rows <= columns else (eye, full)
