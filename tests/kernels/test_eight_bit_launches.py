"""The GEMM and the quantization of rows, compiled as they are launched, fit into the shared memory of every GPU.

Of every one that has e4m3; in int8, of those without it too. Other kernels of 8 bits have such a test of their own.
"""

import pytest
import torch

from lsr_scale.kernels.fp8 import E4M3
from lsr_scale.kernels.gemm_8bit import gemm_8bit
from lsr_scale.kernels.quantize_rows import quantize_rows
from tests.kernels.checks import OnGpu, launched

TOKENS = 64


def check(scenario, *arguments, kernels, room, capabilities):
    """Compile what a scenario launches on GPUs with so many KiB of shared memory for a program, see that it fits."""
    launches = launched(scenario, *arguments, shared_bytes=room * 1024, capabilities=capabilities)
    assert {name for name, _, _ in launches} == kernels
    assert {capability for _, capability, _ in launches} == set(capabilities)
    too_much = [(name, f"sm_{capability}", used / 1024) for name, capability, used in launches if used > room * 1024]
    assert not too_much, f"more than {room} KiB: {too_much}"


def multiplied(columns, dtype):
    """Multiply as a layer's linears do, forward and backward, with adapters of so many columns.

    Depth and width are arguments at run time: all layers have the same kernel.
    """
    empty, depth, width = OnGpu.empty, 4096, 6144
    codes, weight = empty(TOKENS, depth, dtype=dtype), empty(width, depth, dtype=dtype)
    scales, out, thin = empty(TOKENS, dtype=torch.float32), empty(TOKENS, width), empty(TOKENS, columns)
    weight_scale = empty(width if dtype == torch.int8 else 1, dtype=torch.float32)
    gemm_8bit(codes, scales, weight, weight_scale, out, thin=thin, up=empty(width, columns), bias=empty(width))
    gemm_8bit(codes, scales, weight, weight_scale, out, thin=thin, down=empty(columns, width))


@pytest.mark.parametrize(
    ("columns", "dtype", "room", "capabilities"),
    [
        (64, E4M3, 99, (89, 120)),
        (64, E4M3, 227, (90, 100)),
        (64, torch.int8, 99, (86, 89, 120)),
        (64, torch.int8, 163, (80,)),
        (64, torch.int8, 227, (90, 100)),
        # a loop over the columns, of a tile for each size of shared memory
        (192, E4M3, 99, (89,)),
        (192, E4M3, 227, (90,)),
        (192, torch.int8, 99, (89,)),
        (192, torch.int8, 227, (90,)),
    ],
)
def test_products(columns, dtype, room, capabilities):
    check(multiplied, columns, dtype, kernels={"_gemm_8bit_kernel"}, room=room, capabilities=capabilities)


def quantized(columns, tokens, dtype, widths):
    """Quantize rows of layers' widths, with and without adapters of so many columns."""
    empty = OnGpu.empty
    counts = torch.zeros(2, dtype=torch.int64)
    for width in widths:
        # output gradients are columns of a wider matrix
        x = empty(tokens, width + 64)[:, :width]
        arguments = x, empty(tokens, width, dtype=dtype), empty(tokens, dtype=torch.float32)
        pair = {"projection": empty(columns, width), "product": empty(tokens, columns)} if columns else {}
        quantize_rows(*arguments, **pair, rank=columns * 3 // 4 or None, counts=counts if width in ONE_WIDTH else None)


# of a Mistral layer and of a small model; tiles depend on the width, not on the GPU
ONE_WIDTH, WIDTHS = (4096,), (576, 4096, 6144, 28672)


@pytest.mark.parametrize(
    ("columns", "dtype", "widths", "capabilities"),
    [
        *((columns, E4M3, WIDTHS, (89,)) for columns in (0, 64, 128)),
        *((columns, E4M3, ONE_WIDTH, (90, 100, 120)) for columns in (0, 64)),
        *((columns, torch.int8, WIDTHS, (86,)) for columns in (0, 64)),
        *((columns, torch.int8, ONE_WIDTH, (80, 89, 90, 100, 120)) for columns in (0, 64)),
    ],
)
def test_rows(columns, dtype, widths, capabilities):
    kernels = {"_quantize_rows_kernel"} | ({"_sum_partials_kernel"} if columns and len(widths) > 1 else set())
    check(quantized, columns, TOKENS, dtype, widths, kernels=kernels, room=99, capabilities=capabilities)


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_a_single_row(dtype):
    """Triton makes a constant of an argument that is 1."""
    kernels = {"_quantize_rows_kernel", "_sum_partials_kernel"}
    check(quantized, 64, 1, dtype, (4096, 6144), kernels=kernels, room=227, capabilities=(90,))
