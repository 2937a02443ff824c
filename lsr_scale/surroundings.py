"""What a call from another program, such as a notebook, leaves as it was: environment, logging, memory, signals."""

import contextlib
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator

import datasets
import huggingface_hub.utils
import torch
from transformers.utils import logging as transformers_logging

from lsr_scale.errors import UserError
from lsr_scale.screen import LOGGERS

_LOGGERS = (*LOGGERS, "DeepSpeed")


@contextlib.contextmanager
def as_found(quiet: bool = False) -> Iterator[None]:
    """Do something for another program: only our own lines are shown, and nothing else of the process is changed.

    The libraries' warnings and progress bars are off within. Afterwards they, the environment's variables, log levels
    and handlers, signal handlers and matplotlib's backend are as they were, and memory that nothing holds is free, on
    the GPU too. A mistake is raised anew, in Python's words, without the frames that would hold the model.

    Args:
        quiet: Show nothing at all.

    Raises:
        UserError: for what a user can fix.
        KeyboardInterrupt: for Ctrl-C, with words about what was saved.
    """
    words: str | None = None
    error: type[BaseException] = UserError
    try:
        with contextlib.ExitStack() as kept:
            for keep in (_environment, _logging, _signals, _plots):
                kept.enter_context(keep())
            kept.enter_context(warnings.catch_warnings())
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category)
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a title that a picture cannot show
            if quiet:
                kept.enter_context(contextlib.redirect_stdout(io.StringIO()))
                kept.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    except UserError as mistake:
        words = in_python(str(mistake))
        traceback.clear_frames(mistake.__traceback__)  # what is raised below leads to it, and they hold the model
    except Exception as ended:
        number = getattr(ended, "status", 0) - 128  # `Terminated`, which its module would import a trainer for
        if number == signal.SIGTERM:  # what it would have done at once, now that a checkpoint is saved
            signal.raise_signal(signal.SIGTERM)
        if number != signal.SIGINT:
            raise
        words, error = in_python(str(ended)), KeyboardInterrupt
        traceback.clear_frames(ended.__traceback__)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if words is not None:
        raise error(words)


def in_python(text: str) -> str:
    """Return a message whose advice is options of the command line, with the arguments that they are in Python."""
    text = re.sub(r"--set ([\w.]+)=(\.\.\.|\S+?)(?=[\s,;)]|$)", r'overrides={"\1": \2}', text)
    text = text.replace("--resume auto", 'resume="auto"').replace("the same command with", "the same call with")
    text = re.sub(r"--no-([a-z-]+)", lambda found: f"{found[1].replace('-', '_')}=False", text)
    flags = "overwrite|base-only|without-questions|merged|accuracy"
    text = re.sub(rf"--({flags})\b", lambda found: f"{found[1].replace('-', '_')}=True", text)
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Turn the libraries' messages and progress bars off, and afterwards back to what they were."""
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    handlers, level, verbosity = root.handlers[:], root.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    of_datasets, of_the_hub = datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        root.handlers[:] = handlers
        root.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not of_datasets:
            datasets.enable_progress_bars()
        if not of_the_hub:
            huggingface_hub.utils.enable_progress_bars()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def _plots() -> Iterator[None]:
    """Keep matplotlib's backend, by which a notebook shows its own plots."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_backend() if pyplot else os.environ.get("MPLBACKEND")
    try:
        yield
    finally:
        if before and (matplotlib := sys.modules.get("matplotlib")) and matplotlib.get_backend() != before:
            with contextlib.suppress(ImportError, ValueError):
                matplotlib.use(before)
