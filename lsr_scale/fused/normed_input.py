"""RMSNorm in front of a group of linears: their input and its thin products with every `down`, in one pass over x."""

from typing import Any

from torch import Tensor

from lsr_scale.fused.layer_state import SavedTensors
from lsr_scale.fused.linear_groups import LinearGroup, mm_float
from lsr_scale.kernels.rms_norm import rms_norm
from lsr_scale.kernels.rms_norm_project import rms_norm_project


def normed_input(
    group: LinearGroup,
    norm: Any,
    x: Tensor,
    matrix: Tensor,
    saved: SavedTensors,
    names: tuple[str, str],
    **sums: Tensor,
) -> Tensor:
    """Return a group's input `[T, K + R]`: n, the normalized x, and `n down^T`; save rstd and the latter by `names`."""
    normed = group.input_buffer(len(x), x)
    if not group.width:
        saved[names[0]] = rms_norm(x, norm.weight, norm.variance_epsilon, normed, **sums)
        return normed
    xa = saved[names[1]] = x.new_empty(len(x), group.width)
    downs, rank = group.downs(matrix), sum(group.ranks)
    saved[names[0]] = rms_norm_project(x, norm.weight, norm.variance_epsilon, normed, downs, xa, rank=rank, **sums)
    return normed


def normed_down_gradients(group: LinearGroup, ds: Tensor, x: Tensor, rstd: Tensor, norm: Any) -> list[Tensor | None]:
    """Return each `d down_i = ds_i^T n`, n = x * rstd * weight; n is not computed: rstd and weight go to thin sides."""
    scaled = (ds * rstd[:, None]).to(ds.dtype)
    return group.down_gradients(mm_float(scaled.t(), x) * norm.weight)
