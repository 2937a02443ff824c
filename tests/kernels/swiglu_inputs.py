"""SwiGLU's inputs and its results by autograd, for the tests of all of its kernels."""

import torch
from torch.nn import functional

FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-3}


def randn(*shape, dtype, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)


def gradients(grad, gate_up):
    """Return `(h, gradient of gate_up)` by autograd in the tensors' own dtype."""
    leaf = gate_up.detach().clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    h = functional.silu(gate) * up
    h.backward(grad)
    assert leaf.grad is not None
    return h.detach(), leaf.grad
