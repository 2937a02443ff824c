"""What the scripts' command lines share: a parser, a result that is never overwritten, and the command as recorded."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for a script, whose docstring's first line it shows."""
    return argparse.ArgumentParser(description=(description or "").split("\n")[0])


def new_file(text: str) -> Path:
    """Return the path of a result to be written, as an argument's type.

    Raises:
        argparse.ArgumentTypeError: if it exists.
    """
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} exists; results are never overwritten, give a new name")
    return Path(text)


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

    def moved(match: re.Match[str]) -> str:
        (script,) = (ROOT / "benchmarks").rglob(f"{match[1]}.py")
        return "python -m " + ".".join(script.relative_to(ROOT).with_suffix("").parts)

    return re.sub(r"python benchmarks/(\w+)\.py", moved, command)
