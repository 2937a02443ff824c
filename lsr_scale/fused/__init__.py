"""The fused path: decoder layers as single autograd functions over a frozen base, for any low-rank adapter method."""

from lsr_scale.fused.fp8 import fp8_counts, fp8_errors, fp8_groups, keep_in_bf16, measure_fp8_errors, reset_fp8_counts
from lsr_scale.fused.memory import MemoryReport, clear_weight_cache, fit_memory
from lsr_scale.fused.patching import FuseReport, fuse, unfuse

__all__ = [
    "FuseReport",
    "MemoryReport",
    "clear_weight_cache",
    "fit_memory",
    "fp8_counts",
    "fp8_errors",
    "fp8_groups",
    "fuse",
    "keep_in_bf16",
    "measure_fp8_errors",
    "reset_fp8_counts",
    "unfuse",
]
