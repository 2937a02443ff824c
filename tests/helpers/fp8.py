"""FP8 without a GPU: the device check passes, and the references compute."""

import importlib
import pkgutil
import sys
from typing import Any

import lsr_scale.fused


def pretend_fp8(monkeypatch: Any) -> None:
    """Have every module that asks take this machine's CPU for a device with FP8."""
    for module in pkgutil.iter_modules(lsr_scale.fused.__path__, "lsr_scale.fused."):
        importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("lsr_scale.") and hasattr(module, "fp8_fallback_reason"):
            monkeypatch.setattr(module, "fp8_fallback_reason", lambda device: None)
