"""Rows as the trainer takes them: their lengths, padding, and what loads them."""

from collections.abc import Mapping
from typing import Any

from lsr_scale.config.training.subject import Subject

ROWS = Subject(
    bounds={
        "max_length": {"ge": 1, "le": 2**24},
        "pad_to_multiple_of": {"ge": 1, "le": 65_536},
        "dataloader_num_workers": {"ge": 0, "le": 1024},
        "dataloader_prefetch_factor": {"ge": 1, "le": 65_536},
        "dataset_num_proc": {"ge": 1, "le": 1024},
    },
)


def longest_row(training: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a row has in training, completions included; None where nothing limits them."""
    if training["method"] == "grpo":
        return training["max_prompt_length"] + training["max_completion_length"]
    return training.get("max_length")
