"""The fused path: decoder layers as single autograd functions over a frozen base, for any low-rank adapter method."""

from lsr_scale.fused.memory import MemoryReport, clear_weight_cache, fit_memory
from lsr_scale.fused.patching import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "MemoryReport", "clear_weight_cache", "fit_memory", "fuse", "unfuse"]
