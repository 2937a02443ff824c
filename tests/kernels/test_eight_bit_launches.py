"""The GEMM and the quantization of rows, compiled as they are launched, fit into the shared memory of every GPU.

Of every one that has e4m3; in int8, of those without it too. Other kernels of 8 bits have such a test of their own.
"""

import pytest
import torch

from lsr_scale.kernels.fp8 import E4M3
from lsr_scale.kernels.gemm_8bit import gemm_8bit
from lsr_scale.kernels.quantize_rows import quantize_rows
from tests.kernels.checks import OnGpu, launched

# compute capabilities by the KiB of shared memory that a program can have
ROOM = {99: (89, 120), 227: (90, 100)}
INT8_ROOM = {99: (86, 89, 120), 163: (80,), 227: (90, 100)}
TOKENS = 64


def check(scenario, *arguments, kernels, room, capabilities=ROOM):
    """Compile what a scenario launches, for the GPUs with so much shared memory, and see that it fits."""
    launches = launched(scenario, *arguments, shared_bytes=room * 1024, capabilities=capabilities[room])
    assert {name for name, _, _ in launches} == kernels
    assert {capability for _, capability, _ in launches} == set(capabilities[room])
    too_much = [(name, f"sm_{capability}", used / 1024) for name, capability, used in launches if used > room * 1024]
    assert not too_much, f"more than {room} KiB: {too_much}"


def multiplied(columns, tokens, dtype=E4M3):
    """Multiply as two layers' linears do, forward and backward, with adapters of so many columns."""
    empty = OnGpu.empty
    for depth, width in ((576, 1536), (4096, 6144)):
        codes, weight = empty(tokens, depth, dtype=dtype), empty(width, depth, dtype=dtype)
        scales, out = empty(tokens, dtype=torch.float32), empty(tokens, width)
        weight_scale = empty(width if dtype == torch.int8 else 1, dtype=torch.float32)
        gemm_8bit(codes, scales, weight, weight_scale, out, bias=empty(width))
        thin = empty(tokens, columns)
        gemm_8bit(codes, scales, weight, weight_scale, out, thin=thin, up=empty(width, columns))
        gemm_8bit(codes, scales, weight, weight_scale, out, thin=thin, down=empty(columns, width))


@pytest.mark.parametrize(
    ("room", "dtype"), [(99, E4M3), (227, E4M3), (99, torch.int8), (163, torch.int8), (227, torch.int8)]
)
@pytest.mark.parametrize("columns", [64, 192])
def test_products(columns, room, dtype):
    capabilities = INT8_ROOM if dtype == torch.int8 else ROOM
    check(multiplied, columns, TOKENS, dtype, kernels={"_gemm_8bit_kernel"}, room=room, capabilities=capabilities)


def quantized(columns, tokens, dtype=E4M3):
    """Quantize rows of a Mistral layer and of a small model, with and without adapters of so many columns."""
    empty = OnGpu.empty
    counts = torch.zeros(2, dtype=torch.int64)
    for width in (576, 4096, 6144, 28672):
        # output gradients are columns of a wider matrix
        x = empty(tokens, width + 64)[:, :width]
        arguments = x, empty(tokens, width, dtype=dtype), empty(tokens, dtype=torch.float32)
        if columns:
            pair = {"projection": empty(columns, width), "product": empty(tokens, columns)}
            quantize_rows(*arguments, **pair, rank=columns * 3 // 4, counts=counts if width == 4096 else None)
        else:
            quantize_rows(*arguments)
            quantize_rows(*arguments, counts=counts)


@pytest.mark.parametrize("room", [99, 227])
@pytest.mark.parametrize("columns", [0, 64, 128])
def test_rows(columns, room):
    kernels = {"_quantize_rows_kernel"} | ({"_sum_partials_kernel"} if columns else set())
    check(quantized, columns, TOKENS, kernels=kernels, room=room)


@pytest.mark.parametrize("room", [99, 163, 227])
@pytest.mark.parametrize("columns", [0, 64])
def test_rows_in_int8(columns, room):
    kernels = {"_quantize_rows_kernel"} | ({"_sum_partials_kernel"} if columns else set())
    check(quantized, columns, TOKENS, torch.int8, kernels=kernels, room=room, capabilities=INT8_ROOM)


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_a_single_row(dtype):
    """Triton makes a constant of an argument that is 1."""
    check(quantized, 64, 1, dtype, kernels={"_quantize_rows_kernel", "_sum_partials_kernel"}, room=227)
