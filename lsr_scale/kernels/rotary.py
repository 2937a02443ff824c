"""Rotary position embedding of all heads of a projection, in one pass, in place if wanted.

    out = x * cos + rotate_half(x) * sin,        rotate_half(x) = cat(-x2, x1) for the halves x1, x2 of a head

The inverse is the exact transpose of this map, whatever the tables hold: the backward pass. Float32 arithmetic, one
rounding; bytes: `x` once, `out` once (4 per element of a 16-bit dtype), and the tables.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, tl, triton, use_triton


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, inverse: bool = False) -> None:
    """Compute `rotate` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[0], device=x.device) % cos.shape[0]
    cos, sin = cos.to(wide)[positions, None], sin.to(wide)[positions, None]
    x = x.to(wide)
    if inverse:
        first, second = (x * sin).chunk(2, -1)
        out.copy_(x * cos + torch.cat((second, -first), -1))
    else:
        first, second = x.chunk(2, -1)
        out.copy_(x * cos + torch.cat((-second, first), -1) * sin)


@jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    num_heads,
    half,
    num_positions,
    x_row_stride,
    x_head_stride,
    out_row_stride,
    out_head_stride,
    cos_row_stride,
    sin_row_stride,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    # 64 bits: tokens times row stride exceeds 2^31 for long batches
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)
    in_half = columns < half
    cos += (token % num_positions) * cos_row_stride + columns
    sin += (token % num_positions) * sin_row_stride + columns
    cos1 = tl.load(cos, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    mask = (heads < num_heads) & in_half[None, :]
    x += token * x_row_stride + heads * x_head_stride + columns[None, :]
    out += token * out_row_stride + heads * out_head_stride + columns[None, :]
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        out1 = x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 - x1 * sin1
    else:
        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2
    tl.store(out, out1.to(out.dtype.element_ty), mask=mask)
    tl.store(out + half, out2.to(out.dtype.element_ty), mask=mask)


def rotate_triton(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    inverse: bool = False,
    block_heads: int | None = None,
    num_warps: int = 4,
) -> None:
    """Launch the kernel; the arguments are `rotate`'s, then a program's heads and warps."""
    tokens, heads, width = x.shape
    assert width % 2 == 0
    assert out.shape == x.shape
    assert x.stride(2) == out.stride(2) == cos.stride(1) == sin.stride(1) == 1
    assert cos.shape == sin.shape
    assert cos.shape[1] == width
    if block_heads is None:
        block_heads = min(triton.next_power_of_2(heads), 32)
    _rotate_kernel[(tokens, triton.cdiv(heads, block_heads))](
        x,
        cos,
        sin,
        out,
        heads,
        width // 2,
        cos.shape[0],
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        cos.stride(0),
        sin.stride(0),
        INVERSE=inverse,
        HEADS=block_heads,
        HALF=triton.next_power_of_2(width // 2),
        num_warps=num_warps,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, inverse: bool = False) -> None:
    """Write every head of `x`, rotated by its token's angles, to `out`.

    Args:
        x: `[T, H, D]`, D even, unit stride in the last dimension and any others: a slice of a projection's output.
        cos: `[P, D]`, float32 or the dtype of `x`; the row of token t is `t % P`, so one table of a sequence's
            positions serves a batch of them, and P = T gives each token its own row.
        sin: Like `cos`.
        out: Where the result goes, like `x`; may be `x` itself, else must not overlap it.
        inverse: Apply the transposed map: `x` is then the gradient of the rotated heads.
    """
    if is_fake(x):
        return
    run = rotate_triton if use_triton(x) else rotate_reference
    run(x, cos, sin, out, inverse=inverse)
