"""The factors of an adapter that are made of its base's weights, and so are not in its file: made again of the base."""

import dataclasses
from typing import Any

from lsr_scale.adapters.peft.base_weight import frozen_of
from lsr_scale.adapters.save_and_load import load_adapter
from lsr_scale.exporting.source import WRAPPER, AdapterSource
from lsr_scale.exporting.verify import base_section
from lsr_scale.model import load_base


def with_base_factors(source: AdapterSource, base_name: str | None = None, model: Any = None) -> AdapterSource:
    """Return an adapter with the frozen factors of its modules; the same where its method has none.

    Args:
        source: The adapter.
        base_name: Its base, where that lies elsewhere than when it was trained.
        model: A model that has the adapter, where there is one; without, its base is loaded, quantized as then.

    Raises:
        UserError: if nothing names the base, or it cannot be loaded, or gives other factors than it was trained with.
    """
    if not source.needs_base:
        return source
    if model is None:
        base = load_base(**base_section(source, base_name), head_from_adapter=True)
        model, _ = load_adapter(base, source.folder)
    frozen = frozen_of(model, "default")
    on_cpu = {
        module.removeprefix(WRAPPER): {name: value.cpu() for name, value in factors.items()}
        for module, factors in frozen.items()
    }
    return dataclasses.replace(source, frozen=on_cpu)
