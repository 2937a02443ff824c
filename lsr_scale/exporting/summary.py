"""What an export came to, in words: for the terminal and for its card; `export.json` has the plain numbers."""

from collections.abc import Mapping
from typing import Any

from lsr_scale.units import byte_size

# numbers that are told in the line of another
_TOLD_ELSEWHERE = ("bytes of the file", "tensors, of the 16-bit factors'", "truncation error, largest")


def in_words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines to show, by what they are about, in the order of the summary.

    Args:
        summary: As `export.json` holds it.
    """
    lines: dict[str, str] = {}
    for name, value in summary.items():
        if name == "bytes of tensors":
            lines["size"] = _size(summary)
        elif name == "bytes of the file" and "bytes of tensors" not in summary:
            lines["size"] = byte_size(value)
        elif name == "ranks":
            lines["rank of the LoRA" if value.isdigit() else "ranks of the LoRA"] = value
        elif name == "truncation error, median":
            largest = summary["truncation error, largest"]
            lines["truncation error"] = f"{value:.2g} of an update's norm in the median layer, {largest:.2g} at most"
        elif name == "relative error of quantizing again, median":
            lines["error of quantizing again"] = f"{value:.2g} of a weight's norm in the median layer"
        elif name == "seconds to write":
            lines["time to write"] = f"{value:.1f} s"
        elif name == "logits":
            lines["verified"] = value
        elif name == "weights" and isinstance(value, list):
            lines[name] = ", ".join(f"{weight:g}" for weight in value)
        elif name not in _TOLD_ELSEWHERE:
            lines[name] = str(value)
    return lines


def _size(summary: Mapping[str, Any]) -> str:
    size, share = byte_size(summary["bytes of tensors"]), summary.get("tensors, of the 16-bit factors'")
    if share is None:
        return size
    if share == 1:
        return f"{size}, the trained parameters in 16 bits"
    return f"{size}, {share:.3g} times what the trained parameters take in 16 bits"
