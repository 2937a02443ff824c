"""Import the libraries without what takes half of the time: garbage collections, and a compiler that nothing calls."""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import within it what imports torch, transformers, peft or bitsandbytes.

    The garbage collector rests: importing makes a million objects that stay, and it would look at all of them again and
    again, and once more at the program's end: what was imported with torch is frozen. Nothing holds a GPU's memory by
    then. What is decorated with `torch.compile`, as functions of bitsandbytes are that a run may never call, gets its
    compiler when it is called first: to look it up imports TorchInductor.
    """
    collects, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        import torch

        compile_now, torch.compile = torch.compile, _compile_when_called(torch.compile)
        try:
            yield
        finally:
            torch.compile = compile_now
    finally:
        if first:
            gc.freeze()
        if collects:
            gc.enable()


def _compile_when_called(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `torch.compile` that compiles a function when it is called first; anything else at once."""

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if not hasattr(model, "__code__"):  # a module has more than a call
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return compile_later
