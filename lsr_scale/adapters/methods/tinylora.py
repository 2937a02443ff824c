"""TinyLoRA (arXiv 2602.04118), PEFT's own, under this package's option names: LoRA-XS whose R is a vector's.

    dW = B (sum_i v_i P_i) A,   W ~ U S V^T truncated to the rank,   A = S^(1/2) V^T,   B = U S^(1/2),   P_i random

The vector v `[u]` trains, zero at the start; modules may share one. PEFT's plain layers compute it, unfused, and need a
base that is not quantized. Its file has A and B too: export it with PEFT's `merge_and_unload`.
"""

import dataclasses

from peft import TinyLoraConfig

from lsr_scale.adapters.peft import option
from lsr_scale.errors import UserError


@dataclasses.dataclass
class TinyloraOptions:
    """Options of TinyLoRA; everything else stays at PEFT's default."""

    target_modules: list[str] | str | None = option(
        None, "Names (or one regular expression) of the modules to adapt, or 'all-linear'."
    )
    rank: int = option(2, "Rank of the truncated SVD, which is frozen.")
    u: int = option(64, "Length of the vector that trains.")
    weight_tying: float = option(0.0, "From 0, a vector for each module, to 1, one for all of them.")
    dropout: float = option(0.0, "Dropout on the adapter's input, in training.")
    projection_seed: int = option(42, "Seed of the random matrices P_i.")
    save_projection: bool = option(True, "Save the matrices P_i too; else they are drawn again when it is loaded.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list, if layers_to_transform needs it.")
    modules_to_save: list[str] | None = option(None, "Modules fully trained and saved with the adapter.")

    def to_peft(self) -> TinyLoraConfig:
        """Return PEFT's config of the same meaning."""
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        if not 0 <= self.weight_tying <= 1:
            raise UserError(f"weight_tying: expected 0 <= weight_tying <= 1, got {self.weight_tying}")
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rank, dropout = shared.pop("rank"), shared.pop("dropout")
        return TinyLoraConfig(r=rank, tinylora_dropout=dropout, **shared)
