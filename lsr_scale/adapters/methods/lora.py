"""LoRA (arXiv 2106.09685), PEFT's own, under this package's option names: the baseline of the other methods."""

import dataclasses
from typing import Literal

from peft import LoraConfig

from lsr_scale.adapters.peft import option
from lsr_scale.errors import UserError
from lsr_scale.option_checks import LAYERS_BESIDE_EXPRESSION, check_start


@dataclasses.dataclass
class LoraOptions:
    """Options of LoRA; everything else stays at PEFT's default."""

    target_modules: list[str] | str | None = option(
        None, "Names (or one regular expression) of the modules to adapt, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = option(None, "Names (or one regular expression) of modules to leave out.")
    rank: int = option(8, "Rank of the adapter.")
    alpha: float | None = option(None, "Numerator of the scaling alpha / rank; 2 * rank by default.")
    dropout: float = option(0.0, "Dropout on the adapter's input, in training; 0 keeps the fast path.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank), as rsLoRA and RoRA do, instead of alpha / rank.")
    rank_pattern: dict[str, int] = option(dict, "Rank by module.")
    alpha_pattern: dict[str, float] = option(dict, "Alpha by module.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list, if layers_to_transform needs it.")
    init: Literal["zero", "gradient"] = option(
        "zero",
        "What A is at the start, where B is zero: random (zero), or the loss's gradient's directions (gradient).",
    )
    init_rows: int = option(64, "With init: gradient, of how many training rows (or packed sequences) the gradient is.")
    modules_to_save: list[str] | None = option(None, "Modules fully trained and saved with the adapter.")

    def to_peft(self) -> LoraConfig:
        """Return PEFT's config of the same meaning."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_start(self.init, ("zero", "gradient"), self.init_rows)
        del shared["init"], shared["init_rows"]  # PEFT's own LoRA-GA changes the base, which may be quantized or shared
        rank, alpha, dropout = shared.pop("rank"), shared.pop("alpha"), shared.pop("dropout")
        everything = shared.pop("target_modules") if self.target_modules == "all-linear" else None
        if isinstance(shared.get("target_modules"), str) and self.layers_to_transform is not None:
            raise UserError(f"layers_to_transform: {LAYERS_BESIDE_EXPRESSION}")
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, bias="none", **shared
        )
        if everything is not None:
            config.target_modules = everything  # PEFT refuses it beside layers, and makes a list of names of it later
        return config
