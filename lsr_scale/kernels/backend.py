"""Triton where it is installed, else stubs, so that every module here imports and its reference runs."""

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

has_triton = find_spec("triton") is not None


class _Anything(type):
    """A class that has every attribute: Triton's modules, to the type checker and where Triton is missing."""

    def __getattr__(cls, name: str) -> Any:
        return Any


if TYPE_CHECKING or not has_triton:

    class triton(metaclass=_Anything):  # noqa: N801, D101
        pass

    class tl(metaclass=_Anything):  # noqa: N801, D101
        constexpr = Any

    def jit(kernel: Any) -> Any:
        """Return the function as it is: it is never launched without Triton."""
        return kernel
else:
    import triton
    import triton.language as tl

    jit = triton.jit

# What tl.reduce combines with. tl.sum and tl.max are jit functions themselves: the interpreter runs them only if
# TRITON_INTERPRET is set before Triton is imported.
row_sum = tl.standard._sum_combine if has_triton else None
row_max = tl.standard._elementwise_max if has_triton else None


def is_fake(x: Tensor) -> bool:
    """Tell whether a tensor is a FakeTensor, without data: an operation allocates its results and launches nothing."""
    return isinstance(x, FakeTensor)


def use_triton(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether kernels run in Triton for a tensor like `x`: on a GPU, with real data, in bf16, fp16 or fp32.

    Args:
        x: The tensor.
        dtype: What is computed with, if not the dtype of `x`.
    """
    return (
        has_triton
        and x.is_cuda
        and (dtype or x.dtype) in (torch.bfloat16, torch.float16, torch.float32)
        and not is_fake(x)
    )


def shared_memory(x: Tensor) -> int:
    """Return the bytes of shared memory that a program can have on a tensor's GPU; as on a large one for the CPU.

    227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
    """
    return _shared_memory(x.device.index or 0) if x.is_cuda else 227 * 1024


@functools.cache
def _shared_memory(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    # builds for AMD have the second one only
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def multiprocessors(x: Tensor) -> int:
    """Return the multiprocessors of a tensor's GPU; 1 for the CPU."""
    return _multiprocessors(x.device.index or 0) if x.is_cuda else 1


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
