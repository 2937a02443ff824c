"""Fine-tune 4- and 8-bit language models with Kronecker-structured adapters.

Importing this package registers its methods with PEFT.
"""

import importlib as _importlib
import logging as _logging
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from lsr_scale.quick_imports import quick_imports as _quick_imports
from lsr_scale.version import __version__ as __version__

__all__ = [
    "AdapterBank",
    "Decoder",
    "KronLoraConfig",
    "LsrConfig",
    "RunConfig",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "fit_memory",
    "fuse",
    "generate",
    "hotswap_adapter",
    "load_model",
    "load_run",
    "plan",
    "sweep",
    "train",
    "unfuse",
]

# bitsandbytes looks on the hub for a CPU inference kernel that training never uses, and warns when it is not there
_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(_logging.ERROR)

_MODULES = ("lsr_scale", "lsr_scale.launch")  # of `python -m`


def _is_command() -> bool:
    """Tell whether this process is `lsr-scale`, one of its modules, or `launch/train.py`, which says so itself."""
    name = _sys.argv[0].rpartition("/")[2] if _sys.argv else ""
    # while `python -m` looks for the module that it is to run, "-m" stands in place of the module's path
    return name == "lsr-scale" or (name == "-m" and _sys.orig_argv[-len(_sys.argv)] in _MODULES)


# The command parses its options first, so that help and a mistake in them do not wait seconds for torch, transformers
# and peft; what it then calls imports `lsr_scale.adapters`, and with that registers the methods. Any other program
# expects them registered after `import lsr_scale`, in whatever order it imports peft: so here, at once, rather than
# lazily by a hook on peft's import, which would run in the midst of transformers' own imports.
if _TYPE_CHECKING or not _is_command():
    with _quick_imports():
        from lsr_scale import adapters as _adapters  # registers every method with PEFT
        from lsr_scale.adapters.bank import AdapterBank
        from lsr_scale.adapters.hotswap import hotswap_adapter
        from lsr_scale.adapters.methods.kron_lora import KronLoraConfig
        from lsr_scale.adapters.methods.lsr import LsrConfig
        from lsr_scale.errors import UserError
        from lsr_scale.fused import fit_memory, fuse, unfuse
        from lsr_scale.generation import Decoder

    del _adapters

# The commands as functions import what they call: when the first of them is asked for. No package and no module here
# has one of these names, or importing it would replace the function.
_OF_API = ("RunConfig", "compare", "evaluate", "export", "generate", "load_model", "load_run", "plan", "sweep", "train")

if _TYPE_CHECKING:
    from lsr_scale.api import RunConfig, compare, evaluate, export, generate, load_model, load_run, plan, sweep, train


def __getattr__(name: str) -> _Any:
    if name in _OF_API:
        return getattr(_importlib.import_module("lsr_scale.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
