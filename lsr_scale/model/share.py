"""Copies of a base model's modules over the same tensors: several adapters are injected into one base in memory."""

import copy
from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState
from torch import Tensor, nn


def share_base(base: nn.Module) -> Any:
    """Return a copy of a model's modules whose parameters, buffers and other tensors are the original's own.

    What is done to the modules of one (an adapter injected, another class, a hook, train or eval) leaves the others
    as they are; so does a change of a configuration. What is done to a tensor is done for all: nothing may be merged
    into a shared base, moved, or trained. Tied parameters stay tied. Hooks are copied: bound methods of the copied
    modules are bound to their copies.

    Args:
        base: A frozen model, quantized or not, on its device, before `fuse` and without adapters.
    """
    memo: dict[int, Any] = {}
    for module in base.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
        for value in vars(module).values():
            # a 4-bit layer refers to its weight's state, an int8 layer keeps its scales in a state of its own
            parts = vars(value).values() if isinstance(value, bnb.MatmulLtState) else (value,)
            memo |= {id(part): part for part in parts if isinstance(part, Tensor | QuantState)}
    return copy.deepcopy(base, memo)
