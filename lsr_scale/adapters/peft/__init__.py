"""What PEFT asks of any method, written once. A method itself is one file in `adapters/methods/`.

    config.py      the options that every method has (a PeftConfig)
    method.py      what a method defines: its factors' shapes and initialization, `delta_weight` (the dense definition),
                   and `materialize` (the exact pair `(down [R, in], up [out, R])` that the forward pass, the fused path
                   and the exports share)
    base_weight.py factors that are made of the base's own weights
    layer.py       the tuner layer: a frozen linear plus the update
    per_sample.py  a batch whose samples use different adapters (`adapter_names`)
    tuner.py       the tuner model: which modules are adapted, weighted sums
    registry.py    `register`, and the table of registered methods

Each imports only those above it, and none knows a method.
"""

from lsr_scale.adapters.peft.base_weight import check_own_factors
from lsr_scale.adapters.peft.config import AdapterConfig, BaseWeightConfig, option
from lsr_scale.adapters.peft.layer import AdapterLinear, in_out_features, module_suffixes, version_counters
from lsr_scale.adapters.peft.method import AdapterMethod, LowRankPair, Pair, Params, Shapes, upcast
from lsr_scale.adapters.peft.registry import METHODS, register
from lsr_scale.adapters.peft.tuner import AdapterModel

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterLinear",
    "AdapterMethod",
    "AdapterModel",
    "BaseWeightConfig",
    "LowRankPair",
    "Pair",
    "Params",
    "Shapes",
    "check_own_factors",
    "in_out_features",
    "module_suffixes",
    "option",
    "register",
    "upcast",
    "version_counters",
]
