"""Configurations of well-known models, so that planning needs no network: `known_configs.json` beside this file.

An entry has the names that a model is published under and the values of its Transformers configuration that differ
from the defaults of its `model_type`. Variants (instruct versions, mirrors) share an entry if every value is the same.
"""

import functools
import importlib.resources
import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("lsr_scale.model").joinpath("known_configs.json").read_text(encoding="utf-8")
    return {name.lower(): entry for entry in json.loads(text) for name in entry["names"]}


def known_names() -> list[str]:
    """Return the hub names in the table, in their published spelling."""
    return sorted({name for entry in _entries().values() for name in entry["names"]})


def known_config(name: str) -> PreTrainedConfig | None:
    """Return the configuration of a well-known model by its hub name, or None if it is not in the table."""
    entry = _entries().get(name.lower())
    return None if entry is None else AutoConfig.for_model(**entry["config"])
