"""Triton, where it is installed; elsewhere stand-ins, so that every module here imports and its references run."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

has_triton = find_spec("triton") is not None


class _Missing:
    """Stands for `triton.language` in annotations when Triton is not installed."""

    def __getattr__(self, name: str) -> Any:
        return Any


if TYPE_CHECKING or not has_triton:
    triton: Any = _Missing()
    tl: Any = _Missing()

    def jit(kernel: Any) -> Any:
        """Return the function as it is: it is never launched without Triton."""
        return kernel
else:
    import triton
    import triton.language as tl  # noqa: F401

    jit = triton.jit


def use_triton(x: Tensor) -> bool:
    """Tell whether kernels run in Triton for a tensor like `x`: on a GPU, in bf16, fp16 or fp32, with real data."""
    return (
        has_triton
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not isinstance(x, FakeTensor)
    )
