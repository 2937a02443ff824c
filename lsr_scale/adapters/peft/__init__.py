"""What PEFT asks of any method, written once: its config, the registration, the linear layer, the tuner model.

A method (one file in `adapters/methods/`) only says what its factors are and how they make the update:
`delta_weight(params)`, the dense definition, and `materialize(params) -> (down [R, in], up [out, R])`, the exact
low-rank form that the forward pass, the fused path and the exports share. Everything here is method-blind.
"""

from lsr_scale.adapters.peft.config import AdapterConfig, option
from lsr_scale.adapters.peft.layer import AdapterLinear, change_counts, features, last_names, upcast
from lsr_scale.adapters.peft.method import AdapterMethod, LowRankPair, Pair, Params, Shapes
from lsr_scale.adapters.peft.registry import METHODS, register
from lsr_scale.adapters.peft.tuner import AdapterModel

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterLinear",
    "AdapterMethod",
    "AdapterModel",
    "LowRankPair",
    "Pair",
    "Params",
    "Shapes",
    "change_counts",
    "features",
    "last_names",
    "option",
    "register",
    "upcast",
]
