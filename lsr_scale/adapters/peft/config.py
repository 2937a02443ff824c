"""The options that every method has: the `PeftConfig` that PEFT saves as `adapter_config.json`."""

import copy
import dataclasses
from typing import Any, ClassVar, Self

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from lsr_scale.errors import UserError
from lsr_scale.option_checks import check_options, check_types
from lsr_scale.option_names import UnknownOptionError, name_here

# PEFT's bookkeeping: task type, base model name, version
_OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}


def option(default: Any, help_text: str, internal: bool = False) -> Any:
    """Return a dataclass field with a default (a class such as `dict` is a default factory) and a help text.

    One that is `internal` is saved with the others, and no user sets it.
    """
    if internal:
        return dataclasses.field(default=default, metadata={"help": help_text, "internal": True})
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help_text})
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass
class AdapterConfig(PeftConfig):
    """The options every method has; a method's own config adds its own.

    An option `name` of a method becomes settable per module by a field `name_pattern`: a mapping from the end of a
    module's name, or a regular expression for it, to the value there (PEFT's rule for `rank_pattern`).
    """

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
    modules_to_save: list[str] | None = option(None, "Modules fully trained and saved with the adapter.")

    method: ClassVar[Any]  # the `AdapterMethod` whose `config_class` this is; set by `register`

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse an option that the method does not have, with what it is called here."""
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        for name in options:
            if name not in known:
                own = [field for field in known if field not in _OF_PEFT]
                # PEFT drops what a later release saved by these words of a TypeError
                words = f"{cls.__name__}() got an unexpected keyword argument {name!r}"
                raise UnknownOptionError(f"{words}; {name_here(name, own)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Validate the values that no model is needed for."""
        super().__post_init__()
        self.peft_type = PeftType(self.method.name.upper())
        own = [field for field in dataclasses.fields(self) if field.name not in _OF_PEFT]
        check_types({field.name: (field.type, getattr(self, field.name)) for field in own})
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple | set):
                setattr(self, name, set(value))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        check_options(vars(self))
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise UserError("layers_pattern: only has a meaning with layers_to_transform; set both or neither")

    def for_module(self, module_name: str) -> "AdapterConfig":
        """Return a copy with every `*_pattern` applied to the module of that name."""
        config = copy.copy(self)
        for field in dataclasses.fields(self):
            name = field.name.removesuffix("_pattern")
            if name != field.name and hasattr(self, name):
                pattern = getattr(self, field.name)
                setattr(config, name, pattern.get(get_pattern_key(pattern, module_name), getattr(self, name)))
        return config

    @property
    def scaling(self) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv 2312.03732).

        The latter is RoRA's scaling (arXiv 2501.04315) too.
        """
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclasses.dataclass
class BaseWeightConfig(AdapterConfig):
    """The options of a method that makes factors of the base's own weights (`peft/base_weight.py`)."""

    base_sketch: list[float] | None = option(
        None, "Of the factors that are made of the base's weights: others of another base are refused.", internal=True
    )
    base_quantization: dict[str, int] | None = option(
        None, "How those weights are held, and in how many modules: held otherwise they are refused.", internal=True
    )
