"""What trains a run, by `training.method`: a file a method, each with `make_trainer(run, options)`.

A method is such a file and a line in `lsr_scale/config/methods.py`. The loop, the losses and the reference are TRL's; a
file says what goes before its trainer, and what its rows and its model need.
"""

import importlib
from typing import Any


def method_module(method: str) -> Any:
    """Return the module that trains a method, by the method's name."""
    return importlib.import_module(f"{__name__}.{method}")
