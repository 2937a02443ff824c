"""The command that makes a measurement again, as its file records it and as RESULTS.md shows it."""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT


def recorded(module: str, arguments: Sequence[str], out: Path | None = None) -> str:
    """Return the command of a script's run, for the file that the run writes.

    Args:
        module: The script's name below `benchmarks`.
        arguments: Its command line.
        out: The file, whose folder is this machine's affair and left out.
    """
    words = " ".join(["python", "-m", f"benchmarks.{module}", *arguments])
    return words if out is None else words.replace(str(out), out.name)


def current(command: str) -> str:
    """Return a recorded command with the script where it is now: files of before name `benchmarks/NAME.py`."""

    def moved(found: re.Match[str]) -> str:
        (script,) = (ROOT / "benchmarks").rglob(f"{found[1]}.py")
        return "python -m " + ".".join(script.relative_to(ROOT).with_suffix("").parts)

    return re.sub(r"python benchmarks/(\w+)\.py", moved, command)
