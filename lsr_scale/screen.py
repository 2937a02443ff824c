"""Output to the terminal: control characters in files, names or a model's answers are shown as escapes."""

import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Self, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from lsr_scale.errors import printable

# of the libraries that are quiet while a run has the screen
LOGGERS = ("deepspeed", "torch.distributed", "trl", "peft", "accelerate", "torchao", "huggingface_hub")
Item = TypeVar("Item")

_live = SimpleNamespace(text="")  # what the terminal's last line shows, for as long as nothing else is written


class Screen(Console):
    """A rich console that takes no text for markup or emoji codes, and shows control characters as escapes.

    What is to be bold or coloured is a `rich.text.Text` with a style.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, width=max(20, terminal_width()))

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a text of a string, as wide as it is shown."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, but for what its segments hold."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def terminal_width() -> int:
    """Return the columns of the terminal, 80 where it has none or COLUMNS is no number of them."""
    return shutil.get_terminal_size().columns or 80


def open_streams() -> None:
    """See that output can be written: what an encoding lacks as an escape, what goes to a closed stream nowhere."""
    if sys.stdout is None or sys.stderr is None:  # closed by the shell, as `>&-` does
        # nothing that is opened later is to get the number of a stream that libraries write to
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


class AboveLiveLine:
    """In place of a stream that others write to, warnings above all: their text goes above the live line."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.hidden = ""  # the live line, while the text above it has no end

    def write(self, text: str) -> int:
        """Write text; the live line is there again once that is whole lines."""
        if _live.text:
            self.hidden = _live.text
            show_live("")
        number = self.stream.write(text)
        if self.hidden and text.endswith("\n"):
            self.stream.flush()
            hidden, self.hidden = self.hidden, ""
            show_live(hidden)
        return number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def keeping_live_line() -> Iterator[None]:
    """Have what others write, loggers too, go above the live line within; without a terminal nothing changes."""
    if not sys.stdout.isatty():
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = AboveLiveLine(sys.stdout), AboveLiveLine(sys.stderr)
    loggers: list[Any] = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers: set[Any] = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    moved = [(handler, stream) for handler in handlers if (stream := getattr(handler, "stream", None)) in before]
    for handler, stream in moved:
        handler.stream = sys.stdout if stream is before[0] else sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler, stream in moved:
            handler.stream = stream


def show_live(text: str) -> None:
    """Replace the text of the live line, "" clearing it; does nothing where there is no terminal."""
    if sys.stdout.isatty():
        _live.text = printable(text)[: terminal_width() - 1]
        write(f"\r\x1b[2K{_live.text}")


def leave_live() -> None:
    """Leave the live line standing, and go on below it."""
    if sys.stdout.isatty() and _live.text:
        _live.text = ""
        write("\n")


def print_line(text: str) -> None:
    """Print a line that stays, where the live line may stand."""
    show_live("")
    write(f"{printable(text)}\n")


def write(text: str) -> None:
    """Write to the screen; where its reader is gone, as after Ctrl-C on `... | tee`, to nobody from then on."""
    stream = sys.stdout.stream if isinstance(sys.stdout, AboveLiveLine) else None
    try:
        print(text, end="", flush=True, file=stream)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """What a command is at: on a terminal one line that changes, elsewhere a line a stage and a few within it.

    It goes to stderr, so that what a command answers can go elsewhere.
    """

    def __init__(self, quiet: bool = False) -> None:
        """Show nothing where `quiet`."""
        self._quiet, self._stage, self._live = quiet, "", not quiet and sys.stderr.isatty()

    def stage(self, text: str) -> None:
        """Say what begins now."""
        self._stage = text
        self._show(text)

    def over(self, items: Iterable[Item], total: int, what: str, brief: bool = False) -> Iterator[Item]:
        """Yield the items, and say which of them of how many it is: each on a terminal, quarters elsewhere.

        Args:
            items: What there is to do.
            total: Their number.
            what: One of them, in words.
            brief: They are done soon: nothing is said of them elsewhere.
        """
        for number, item in enumerate(items, start=1):
            if self._live or (not brief and number * 4 // total > (number - 1) * 4 // total):
                self._show(f"{self._stage}: {what} {number:,} of {total:,}")
            yield item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live:
            self._write("\r\x1b[2K")

    def _show(self, text: str) -> None:
        if self._live:
            self._write(f"\r\x1b[2K{printable(text)[: terminal_width() - 1]}")
        elif not self._quiet:
            self._write(f"{printable(text)}\n")

    def _write(self, text: str) -> None:
        with suppress(BrokenPipeError):
            print(text, end="", file=sys.stderr, flush=True)
