"""What a file of this folder says of the fields of its subject."""

from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["causal_lm", "seq_cls"]


@dataclass(frozen=True)
class Subject:
    """Fields of the training section that belong together.

    Attributes:
        defaults: What a run gets where its file says nothing; every other field keeps the installed libraries' default.
        bounds: Of numbers, those that the dataclasses leave to a crash later on; upper ones are beyond what anybody
            trains with.
        own: Fields that neither TRL nor transformers has: type and description.
        owned: Fields that the rest of the run decides, with what to set instead.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    own: dict[str, tuple[Any, str]] = field(default_factory=dict)
    owned: dict[str, str] = field(default_factory=dict)
