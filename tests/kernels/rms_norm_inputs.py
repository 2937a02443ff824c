"""RMSNorm's inputs, its float64 result and its eager computation, for both of its kernels' tests."""

import torch

EPS = 1e-5


FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def inputs(shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad, residual_grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    weight = 1 + 0.2 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).to(device) for tensor in (x, weight, residual, grad, residual_grad)]


def forward64(x, weight, residual=None):
    """Return `(s, out)` in float64 for the input as the dtype rounds it."""
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    s = s.double()
    return s, s * (s.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def eager(x, weight, residual=None):
    s = x if residual is None else x + residual
    normalized = s.float() * (s.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    return weight * normalized.to(x.dtype)
