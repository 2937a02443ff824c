"""The fused path: decoder layers as single autograd functions over a frozen base, for any low-rank adapter method."""

from lsr_scale.fused.memory import MemoryReport, fit_memory, release_weights
from lsr_scale.fused.models import FuseReport, fuse, unfuse
from lsr_scale.fused.sharded import gather_by_layer

__all__ = ["FuseReport", "MemoryReport", "fit_memory", "fuse", "gather_by_layer", "release_weights", "unfuse"]
