"""`training.reward`: what completions are worth to GRPO, each reward by its name, with its weight and options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import user_path
from lsr_scale.safe_regex import check_regex

SHIPPED = ("exact_answer", "multiple_choice", "regex", "length")
_OPTIONS = {"regex": "pattern", "length": "tokens"}


class Reward(BaseModel):
    """One of the rewards, whose weighted sum a completion gets."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        description="exact_answer, multiple_choice, regex, length, or file.py:function, relative to the run's file.",
    )
    weight: float = Field(1.0, ge=-1e6, le=1e6, description="What it is multiplied by in the sum.")
    pattern: str | None = Field(
        None, min_length=1, description="regex: 1 where this expression is found in the completion."
    )
    tokens: int | None = Field(
        None, ge=1, le=2**24, description="length: nothing is taken off up to so many tokens; -1 at the most."
    )

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_file(self.name):
            self.name = _absolute(self.name, (info.context or {}).get("folder") or Path())
        elif self.name not in SHIPPED:
            raise ValueError(
                f"{self.name!r:.80} is no reward; {did_you_mean(self.name, SHIPPED).rstrip('?')}; a function of your "
                "own is file.py:function"
            )
        for name, option in _OPTIONS.items():
            if getattr(self, option) is not None and self.name != name:
                raise ValueError(f"{option} is an option of {name}, not of {self.name}; remove it")
        if self.name == "regex":
            if self.pattern is None:
                raise ValueError("regex needs a pattern: {name: regex, pattern: '#### [0-9]+'}")
            try:
                check_regex(self.pattern, "pattern", "write another one, or a function: file.py:name")
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    def is_as(self, other: "Reward") -> bool:
        """Tell whether another one finds the same of every completion, whatever its weight."""
        return (self.name, self.pattern, self.tokens) == (other.name, other.pattern, other.tokens)


def is_file(name: str) -> bool:
    """Tell whether a reward is a user's own function, by how it is written."""
    return ".py:" in name


def _absolute(name: str, folder: Path) -> str:
    file, ending, function = name.partition(".py:")
    if not function.isidentifier():
        raise ValueError(f"{name!r:.80}: expected file.py:function, got {function!r:.40} behind the colon")
    try:
        path = user_path(file + ending[:-1], "name")
    except UserError as error:
        raise ValueError(str(error)) from None
    return f"{(folder / path).resolve()}:{function}"


def _reward(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


# A plain string is a reward's name.
AnyReward = Annotated[Reward, BeforeValidator(_reward, json_schema_input_type=str | Reward)]


def rewards_of(training: Mapping[str, Any]) -> list[Reward]:
    """Return the rewards of a checked `training` section."""
    return [Reward.model_validate(_reward(value)) for value in training.get("reward") or ()]
