"""The training methods (`training.method`), as far as a run's file goes: a line each in `METHODS`.

What trains a method is a file of its name in `lsr_scale/training/methods/`.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainingMethod:
    """What a run's file may say under a method.

    Attributes:
        arguments: TRL's class of its trainer's arguments, by its name below `trl`.
        rows: The kinds of rows that it is trained on, `lsr_scale.data.formats.Kind`.
        defaults: What a run of it gets where its file says nothing, beside `training.DEFAULTS`.
        unused: Fields of the class that have no effect here, with what to do instead.
    """

    arguments: str
    rows: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The name of the class of arguments, such as SFTConfig."""
        return self.arguments.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The module of the class of arguments, below `trl`."""
        return self.arguments.rpartition(".")[0]


_SFT = {
    "max_length": 1024,
    "packing": False,
    "assistant_only_loss": None,  # null: wherever rows are conversations
}

METHODS: dict[str, TrainingMethod] = {
    "sft": TrainingMethod(
        "trainer.sft_config.SFTConfig", ("prompt_completion", "chat_prompt_completion", "messages", "text"), _SFT
    ),
}


def method_of(training: Any) -> str:
    """Return the method that a run's training section names, as written; the default where it names none that is."""
    name = training.get("method", "sft") if isinstance(training, dict) else "sft"
    return name if isinstance(name, str) and name in METHODS else "sft"
