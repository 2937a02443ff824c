"""SwiGLU, forward and backward.

    h = silu(gate) * up                                                 silu(z) = z sigmoid(z)
    d gate = dh * up * sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
    d up = dh * silu(gate)

`gate_up` holds gate in columns [0, F) and up in [F, 2F), as one GEMM leaves them. Float32 arithmetic, one rounding.
Bytes per element of h in a 16-bit dtype: forward 6, backward 10 (12 with h). Fused with the adapters' products: the
forward pass in `swiglu_project.py`, the backward pass in `swiglu_pair_gradients.py`.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from lsr_scale.kernels.backend import is_fake, jit, tl, triton, use_triton


def swiglu_reference(gate_up: Tensor, out: Tensor) -> None:
    """Compute `swiglu` in plain torch, in float32 or, for float64 tensors, in float64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    out.copy_(gate * gate.sigmoid() * up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor, out: Tensor, h_out: Tensor | None = None) -> None:
    """Compute `swiglu_backward` in plain torch, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    # copies, as outputs may be the same memory
    gate, up = gate_up.to(wide, copy=True).chunk(2, -1)
    grad, sigmoid = grad.to(wide, copy=True), gate.sigmoid()
    out.copy_(
        torch.cat(
            (grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid),
            -1,
        )
    )
    if h_out is not None:
        h_out.copy_(gate * sigmoid * up)


@jit
def _swiglu_kernel(gate_up, out, features, gate_up_row_stride, out_row_stride, BLOCK: tl.constexpr):
    # 64 bits: tokens times row stride exceeds 2^31 for long batches
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < features
    gate_up += row * gate_up_row_stride + columns
    gate = tl.load(gate_up, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + features, mask=mask, other=0.0).to(tl.float32)
    h = gate * (1.0 / (1.0 + tl.exp(-gate))) * up
    tl.store(out + row * out_row_stride + columns, h.to(out.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    grad,
    gate_up,
    out,
    h_out,
    features,
    grad_row_stride,
    gate_up_row_stride,
    out_row_stride,
    h_row_stride,
    HAS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < features
    gate_up += row * gate_up_row_stride + columns
    out += row * out_row_stride + columns
    dh = tl.load(grad + row * grad_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + features, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out, d_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + features, (dh * silu).to(out.dtype.element_ty), mask=mask)
    if HAS_H:
        tl.store(h_out + row * h_row_stride + columns, (silu * up).to(h_out.dtype.element_ty), mask=mask)


def row_stride(x: Tensor) -> int:
    """Return the stride between the rows of a matrix, having asserted a unit column stride."""
    assert x.stride(1) == 1, f"strides {x.stride()}: the last must be 1"
    return x.stride(0)


def swiglu_triton(gate_up: Tensor, out: Tensor, *, block: int = 1024, num_warps: int = 4) -> None:
    """Launch the forward kernel; the arguments are `swiglu`'s, then a program's columns and warps."""
    rows, features = out.shape
    assert gate_up.shape == (rows, 2 * features)
    _swiglu_kernel[(rows, triton.cdiv(features, block))](
        gate_up, out, features, row_stride(gate_up), row_stride(out), BLOCK=block, num_warps=num_warps
    )


def swiglu_backward_triton(
    grad: Tensor,
    gate_up: Tensor,
    out: Tensor,
    h_out: Tensor | None = None,
    *,
    block: int = 1024,
    num_warps: int = 4,
) -> None:
    """Launch the backward kernel; the arguments are `swiglu_backward`'s, then a program's columns and warps."""
    rows, features = grad.shape
    assert gate_up.shape == out.shape == (rows, 2 * features)
    assert h_out is None or h_out.shape == grad.shape
    _swiglu_backward_kernel[(rows, triton.cdiv(features, block))](
        grad,
        gate_up,
        out,
        grad if h_out is None else h_out,
        features,
        row_stride(grad),
        row_stride(gate_up),
        row_stride(out),
        row_stride(grad if h_out is None else h_out),
        HAS_H=h_out is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Write `silu(gate) * up` to `out`.

    Args:
        gate_up: `[T, 2F]`, gate in the first F columns; rows may have any row stride.
        out: `[T, F]`, rows of any row stride; may be gate's or up's half of `gate_up`, else must not overlap it.
    """
    if is_fake(gate_up):
        return
    run = swiglu_triton if use_triton(gate_up) else swiglu_reference
    run(gate_up, out)


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor, h_out: Tensor | None = None) -> None:
    """Write the gradients of gate and up to `out`, and h again if asked.

    Args:
        grad: Gradient of h, `[T, F]`; rows of all tensors may have any row stride.
        gate_up: `[T, 2F]`, what `swiglu` was given.
        out: `[T, 2F]`: the gradient of gate in the first F columns, of up in the rest; may be `gate_up` itself.
        h_out: Where h goes, `[T, F]`; may be `grad` itself.
    """
    if is_fake(gate_up):
        return
    run = swiglu_backward_triton if use_triton(gate_up) else swiglu_backward_reference
    run(grad, gate_up, out, h_out)
