"""A user's own reward, `file.py:name` in a run's `training.reward`: found beside the run's file, hashed, loaded.

The file is code, which runs with all that its user may do: only a run's own file can name it, never data or an adapter.
"""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsr_scale.errors import UserError, did_you_mean, shortened

_REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def split_reference(text: str) -> tuple[Path, str] | None:
    """Return the file and the function of `file.py:name`; None for what is no such text."""
    found = _REFERENCE.fullmatch(text)
    return (Path(found["file"]), found["name"]) if found else None


def read_file(file: Path) -> bytes:
    """Return the content of a file that defines a reward.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"training.reward: {file}: cannot be read ({error.strerror}); it is looked for relative to the run's file"
        ) from error


def sha256(content: bytes) -> str:
    """Return the hash by which a run tells that a file has changed."""
    return hashlib.sha256(content).hexdigest()


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Return a function of a Python file, which runs for it, and may import what lies beside it.

    Raises:
        UserError: if the file cannot be read, raises, or has no such function.
    """
    where = f"training.reward: {file}:{name}"
    read_file(file)
    module_name = f"lsr_scale_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: expected a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # what it defines can be pickled, its dataclasses can be made
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file beside it hides no library; for imports within its functions too
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: the file{line_of(error, file)} raises {in_words(error)}; mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        found = "there is no such function" if function is None else f"is no function, but {type(function).__name__}"
        raise UserError(f"{where}: {found}; {did_you_mean(name, functions)}")
    if found := _not_plain(function):
        raise UserError(f"{where}: is {found}; write a plain function (def) that returns a list of numbers")
    return function


def _not_plain(function: Callable[..., Any]) -> str | None:
    """Return what a function is that cannot be called by its parameters' names for a list; None where it can be."""
    if inspect.isclass(function):
        return "a class"
    if inspect.iscoroutinefunction(function):
        return "async"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    needs_place = any(one.kind is one.POSITIONAL_ONLY and one.default is one.empty for one in parameters)
    return "given its arguments by their names, and takes some by their place alone" if needs_place else None


def taken_names(function: Callable[..., Any]) -> tuple[set[str], set[str] | None]:
    """Return the names that a function must be given, and those that it may be; None where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C, which does not say
        return set(), None
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    needed = {one.name for one in named if one.default is one.empty}
    return needed, None if takes_any else {one.name for one in named}


def in_words(error: BaseException) -> str:
    """Return an exception's name and what it says, on one line."""
    said = shortened(" ".join(str(error).split()), 200)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def line_of(error: BaseException, file: Path) -> str:
    """Return ", line 12" for where in a file an exception was raised, "" where it was not in it."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return f", line {lines[-1]}" if lines else ""
