"""What the embedded sets of rows share: their two splits, and the YAML files that lie in this package."""

from importlib import resources
from typing import Any

import yaml

from lsr_scale.errors import UserError, did_you_mean

SPLITS = ("train", "heldout")


def check_split(source: str, split: str) -> None:
    """Refuse a split that no embedded set has.

    Args:
        source: The set, as a run names it: `builtin:chat`.
        split: What was asked for.

    Raises:
        UserError: There is no such split.
    """
    if split not in SPLITS:
        hint = did_you_mean(str(split), SPLITS)
        raise UserError(f"{source}: split must be 'train' or 'heldout', got {split!r}; {hint}")


def read_table(file: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return yaml.safe_load((resources.files("lsr_scale.data") / file).read_text(encoding="utf-8"))
