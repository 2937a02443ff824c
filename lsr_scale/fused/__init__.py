"""The fused path: decoder layers as single autograd functions over a frozen base, for any low-rank adapter method."""

from lsr_scale.fused.memory import MemoryReport, fit_memory, release_weights
from lsr_scale.fused.models import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "MemoryReport", "fit_memory", "fuse", "release_weights", "unfuse"]
