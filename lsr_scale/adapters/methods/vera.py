"""VeRA (arXiv 2310.11454), PEFT's own, under this package's option names: two vectors a module, matrices shared by all.

    dW = diag(b) B diag(d) A,   A [rank, in], B [out, rank] random, frozen and one for the model, b = 0 at the start

PEFT's plain layers compute it, unfused; they take 4- and 8-bit bases. The update is of low rank, but its file has the
matrices apart from the modules: export it with PEFT's `merge_and_unload` or `peft.tuners.lora.conversion`.
"""

import dataclasses

from peft import VeraConfig

from lsr_scale.adapters.peft import option
from lsr_scale.errors import UserError


@dataclasses.dataclass
class VeraOptions:
    """Options of VeRA; everything else stays at PEFT's default."""

    target_modules: list[str] | str | None = option(
        None, "Names (or one regular expression) of the modules to adapt, or 'all-linear'."
    )
    rank: int = option(256, "Rank of the shared matrices; rank + out_features parameters train a module.")
    dropout: float = option(0.0, "Dropout on the adapter's input, in training.")
    d_initial: float = option(0.1, "Where the vector d starts.")
    projection_prng_key: int = option(0, "Seed of the shared matrices.")
    save_projection: bool = option(True, "Save the shared matrices too; else they are drawn again when it is loaded.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list, if layers_to_transform needs it.")
    modules_to_save: list[str] | None = option(None, "Modules fully trained and saved with the adapter.")

    def to_peft(self) -> VeraConfig:
        """Return PEFT's config of the same meaning."""
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rank, dropout = shared.pop("rank"), shared.pop("dropout")
        return VeraConfig(r=rank, vera_dropout=dropout, **shared)
