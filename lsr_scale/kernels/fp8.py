"""Values in FP8: e4m3 codes with a scale that is a power of two.

    x ~ code * s                  code = e4m3(x / s), rounded to the nearest, ties to even
    s = the smallest power of two with largest|x| / s <= 448

448 is the largest value of e4m3, so that nothing saturates, and more than half of it is reached. Division by a power of
two is exact: a code's relative error, at most 2^-4, does not depend on the scale, but for values below 2^-6 s, which
are subnormal or zero in e4m3 (underflow). There is one scale per row of activations and output gradients, and one per
weight.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import has_triton, jit, tl

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Return the smallest power of two `s` with `largest / s <= 448`, for each element.

    Args:
        largest: Largest magnitude of what shares a scale, of any shape.

    Returns:
        Scales, float32, of the same shape: 1 where all is zero, at least 2^-100, so that the inverse is finite; NaN for
        infinity and NaN, so that whatever is multiplied by it is NaN too.
    """
    # 448 = 1.75 * 2^8: the exponent is 8 less, and 1 more where the mantissa exceeds 1.75
    bits = (largest.float().view(torch.int32) & 0x7FFFFFFF).clamp_max(0x7F800000)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp_min(27) << 23).view(torch.float32)
    return scale.masked_fill(bits == 0, 1.0).masked_fill(bits == 0x7F800000, float("nan"))


@jit
def scale_of(largest):
    """Return `power_of_two_scale` of float32 values, bit for bit."""
    bits = tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    scale = (tl.maximum(exponent, 27) << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 0, 1.0, tl.where(bits == 0x7F800000, float("nan"), scale))


def encode_reference(x: Tensor, scales: Tensor) -> Tensor:
    """Return the codes of `x`, `e4m3(x / s)`; beyond 448 they saturate, NaN stays NaN.

    In a kernel: `(x * tl.div_rn(1.0, s)).to(tl.float8e4nv)` of float32 values.

    Args:
        x: `[T, K]`.
        scales: Float32 `[T]`, one per row, or `[1]`, one for all.
    """
    # clamped first: beyond 464 torch's conversion gives NaN on some devices and 448 on others
    return (x.float() / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(E4M3)


def fp8_fallback_reason(device: torch.device | str) -> str | None:
    """Return why products in FP8 cannot run on a device, or None."""
    kind = torch.device(device).type
    if kind != "cuda":
        return f"the device is {kind}, no GPU"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; FP8 needs 8.9 or higher"
    return None if has_triton else "Triton is not installed"
