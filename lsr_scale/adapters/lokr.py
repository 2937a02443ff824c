"""LoKr (arXiv 2309.14859), PEFT's own, under this package's option names: what Kron-LoRA generalizes.

With PEFT's defaults a linear layer's update is `alpha / rank * w1 (x) (w2_a w2_b)`: Kron-LoRA with PEFT's choice of the
split, which `left_in` and `left_out` of Kron-LoRA leave free. PEFT builds the dense update in every forward pass, and
cannot on a 4-bit base.
"""

import dataclasses

from peft import LoKrConfig

from lsr_scale.adapters.base import option
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
    modules_to_save: list[str] | None = option(None, "Modules trained whole and saved with the adapter.")

    def to_peft(self) -> LoKrConfig:
        """Return PEFT's config of the same meaning."""
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"rank: expected an integer >= 1, got {self.rank!r}")
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rank, alpha = same.pop("rank"), same.pop("alpha")
        return LoKrConfig(r=rank, alpha=2 * rank if alpha is None else alpha, **same)
