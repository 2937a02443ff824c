"""Every kernel, compiled as it is launched, fits into the shared memory of every GPU that is supported."""

import pytest
import torch

from lsr_scale.kernels.cross_entropy import cross_entropy
from lsr_scale.kernels.dequantize import Extension, copy_weight, dequantize_4bit, dequantize_int8, fill_extension
from lsr_scale.kernels.output_gradients import output_gradients
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward
from lsr_scale.kernels.rms_norm_project import rms_norm_project
from lsr_scale.kernels.rotary import rotate
from lsr_scale.kernels.swiglu import swiglu, swiglu_backward
from lsr_scale.kernels.swiglu_pair_gradients import swiglu_pair_gradients
from lsr_scale.kernels.swiglu_project import swiglu_project
from tests.kernels.checks import OnGpu, launched

# compute capabilities by the KiB of shared memory that a program can have; for sm_89 Triton makes what it makes for
# sm_86
ROOM = {163: (80,), 99: (86, 120), 227: (90, 100)}
TOKENS, HIDDEN, KEYS, FEATURES = 64, 4096, 1024, 14336


def adapted(columns, dtype, all_kernels):
    """Do what a decoder layer of Mistral's shapes does with adapters of so many columns in a group."""
    empty = OnGpu.empty
    x, weight, outputs = empty(TOKENS, HIDDEN, dtype=dtype), empty(HIDDEN, dtype=dtype), HIDDEN + 2 * KEYS
    matrix = empty(outputs + columns, HIDDEN + columns, dtype=dtype)
    xa, normed = empty(TOKENS, columns, dtype=dtype), empty(TOKENS, HIDDEN + columns, dtype=dtype)
    grad = empty(TOKENS, outputs + columns, dtype=dtype)
    offsets = torch.zeros(outputs // 64, dtype=torch.int32)
    output_gradients(grad[:, :outputs], xa, matrix[:outputs, HIDDEN:], offsets, 64, ds_out=grad[:, outputs:])
    if not all_kernels:
        return
    gate_up, inner = empty(TOKENS, 2 * FEATURES, dtype=dtype), empty(TOKENS, 2 * FEATURES + columns, dtype=dtype)
    if columns <= 128:
        each = min(64, columns // 2)
        tail = grad[:, outputs:]
        swiglu_pair_gradients(
            empty(TOKENS, FEATURES, dtype=dtype),
            gate_up,
            xa,
            (0, each),
            (each, each),
            tail,
            each,
            inner[:, : 2 * FEATURES],
        )
    if dtype == torch.bfloat16:
        downs = matrix[outputs:, :HIDDEN]
        sums = {"residual": x, "residual_out": empty(TOKENS, HIDDEN, dtype=dtype)}
        for more in ({}, sums):
            rms_norm_project(x, weight, 1e-5, normed, downs, xa, rank=columns, **more)
        hidden, down = empty(TOKENS, FEATURES + columns, dtype=dtype), empty(columns, FEATURES + columns, dtype=dtype)
        swiglu_project(gate_up, hidden, down[:, :FEATURES], xa, rank=columns)


def frozen():
    """Do what a layer does whatever its adapters are, on all kinds of bases, and the head."""
    empty = OnGpu.empty
    x, weight, rstd = empty(TOKENS, HIDDEN), empty(HIDDEN), empty(TOKENS, dtype=torch.float32)
    rms_norm(x, weight, 1e-5, empty(TOKENS, HIDDEN + 64)[:, :HIDDEN], residual=x, residual_out=empty(TOKENS, HIDDEN))
    rms_norm_backward(x, x, weight, rstd, empty(TOKENS, HIDDEN + 64)[:, :HIDDEN], residual_grad=x)
    heads, cos = empty(TOKENS, 40, 128), empty(TOKENS, 128)
    rms_norm(heads, empty(128), 1e-5, heads)
    for inverse in (False, True):
        rotate(heads, cos, cos, heads, inverse=inverse)
    gate_up, h = empty(TOKENS, 2 * FEATURES), empty(TOKENS, FEATURES)
    swiglu(gate_up, h)
    swiglu_backward(h, gate_up, gate_up, h)
    cross_entropy(empty(TOKENS, 151936), torch.zeros(TOKENS, dtype=torch.int64), gradient=True)
    out, pair = empty(256 + 64, HIDDEN + 64), (empty(256, 16, dtype=torch.float32), 16, empty(16, HIDDEN))
    extension = Extension(*pair, out[256:, :HIDDEN])
    code = torch.zeros(256)
    for nested in (None, (code, code, code[:1], 256)):
        absmax = torch.zeros(256 * HIDDEN // 64, dtype=torch.float32 if nested is None else torch.uint8)
        packed = torch.zeros(256 * HIDDEN // 2, 1, dtype=torch.uint8)
        dequantize_4bit(packed, absmax, code[:16], out[:256], block_size=64, nested=nested, extension=extension)
    dequantize_int8(torch.zeros(256, HIDDEN, dtype=torch.int8), code, out[:256], extension=extension)
    copy_weight(empty(256, HIDDEN), out[:256], extension=extension)
    fill_extension(out[:256, HIDDEN:], extension)


def check(scenario, *arguments, room, kernels):
    launches = launched(scenario, *arguments, shared_bytes=room * 1024, capabilities=ROOM[room])
    assert {name for name, _, _ in launches} == kernels
    assert {capability for _, capability, _ in launches} == set(ROOM[room])
    too_much = [(name, f"sm_{capability}", used / 1024) for name, capability, used in launches if used > room * 1024]
    assert not too_much, f"more than {room} KiB: {too_much}"


GRADIENTS = {"_output_gradients_kernel", "_reduce_kernel"}
PROJECTIONS = {"_rms_norm_project_kernel", "_swiglu_project_kernel", "_reduce_partials_kernel"}


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_adapters_of_any_width(columns):
    # beyond 128 columns plain GEMMs do the projections, and beyond ranks of 64 the gradients
    small = PROJECTIONS | {"_swiglu_pair_gradients_kernel"}
    kernels = GRADIENTS | (small if columns <= 128 else {"_rms_norm_kernel", "_swiglu_kernel"})
    check(adapted, columns, torch.bfloat16, True, room=99, kernels=kernels)


@pytest.mark.parametrize("room", [163, 227])
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_gradients_where_there_is_more_room(columns, room):
    """The others do not look at it."""
    check(adapted, columns, torch.bfloat16, False, room=room, kernels=GRADIENTS)


@pytest.mark.parametrize(("columns", "room"), [(128, 99), (256, 99), (256, 163)])
def test_adapters_in_float32(columns, room):
    pair = {"_swiglu_pair_gradients_kernel"} if columns <= 128 else set()
    check(adapted, columns, torch.float32, columns <= 128, room=room, kernels=GRADIENTS | pair)


def test_what_has_no_adapters():
    norms = {"_rms_norm_kernel", "_rms_norm_backward_kernel", "_rotate_kernel", "_cross_entropy_kernel"}
    kernels = norms | {"_swiglu_kernel", "_swiglu_backward_kernel", "_dequantize_kernel"}
    check(frozen, room=99, kernels=kernels)
