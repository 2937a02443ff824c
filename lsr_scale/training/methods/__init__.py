"""What trains a run, by `training.method`: a file a method, each with `make_trainer(run, options)`.

A method is such a file and a line in `lsr_scale/config/methods.py`. The loop, the losses and the reference are TRL's; a
file says what goes before its trainer, and what its rows and its model need.
"""

import importlib
import os
from typing import Any

import torch
from packaging.version import Version

from lsr_scale.errors import UserError


def method_module(method: str) -> Any:
    """Return the module that trains a method, by the method's name."""
    return importlib.import_module(f"{__name__}.{method}")


def check_head_runs() -> None:
    """Refuse a release of TRL whose head, of SFT, DPO and KTO, does not run on this machine.

    Raises:
        UserError: with the release that does.
    """
    import trl

    has_triton = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if Version(trl.__version__) < Version("1.16") and not has_triton:
        raise UserError(
            f"TRL {trl.__version__} computes its loss with Triton, on a GPU only; to train on the CPU: "
            "pip install 'trl>=1.16,<1.17'"
        )
