"""The fused path: decoder layers as single autograd functions over a frozen base, for any low-rank adapter method."""

from lsr_scale.fused.eight_bit import (
    compute_errors,
    eight_bit_groups,
    keep_in_bf16,
    measure_compute_errors,
    reset_underflow_counts,
    underflow_counts,
)
from lsr_scale.fused.memory import MemoryReport, clear_weight_cache, fit_memory
from lsr_scale.fused.patching import FuseReport, fuse, unfuse

__all__ = [
    "FuseReport",
    "MemoryReport",
    "clear_weight_cache",
    "compute_errors",
    "eight_bit_groups",
    "fit_memory",
    "fuse",
    "keep_in_bf16",
    "measure_compute_errors",
    "reset_underflow_counts",
    "underflow_counts",
    "unfuse",
]
