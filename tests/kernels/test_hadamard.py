"""The block Hadamard rotation and int8 codes."""

import pytest
import torch

from lsr_scale.kernels import hadamard
from lsr_scale.kernels.backend import has_triton, jit, tl
from lsr_scale.kernels.hadamard import encode_int8_reference, int8_scale, rotate_reference


def test_a_product_of_rotated_matrices_is_the_product():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 192, generator=generator, dtype=torch.float64) for n in (7, 5))
    rotated = rotate_reference(x) @ rotate_reference(weight).t()
    assert torch.allclose(rotated, x @ weight.t(), atol=1e-12)
    assert torch.allclose(rotate_reference(rotate_reference(x)), x, atol=1e-12)


def test_a_massive_channel_is_spread():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 100
    rotated = rotate_reference(x)
    assert rotated.abs().amax() < 20
    error = (encode_int8_reference(rotated, int8_scale(rotated.abs().amax(1))).float()).mul(
        int8_scale(rotated.abs().amax(1))[:, None]
    ) - rotated
    plain = (encode_int8_reference(x, int8_scale(x.abs().amax(1))).float()).mul(
        int8_scale(x.abs().amax(1))[:, None]
    ) - x
    assert error.norm() < plain.norm() / 4


def test_scales():
    largest = torch.tensor([0.0, 127.0, 1e-45, float("inf"), float("nan"), 1.0])
    scales = int8_scale(largest)
    assert scales[0] == 1
    assert scales[1] == 1
    assert 0 < scales[2] < 1e-30
    assert scales[3].isnan()
    assert scales[4].isnan()
    assert scales[5] == torch.tensor(1 / 127)


@jit
def _kernel(x, largest, codes, scales, out, height: tl.constexpr, width: tl.constexpr):
    rows, columns = tl.arange(0, height)[:, None], tl.arange(0, width)[None, :]
    tile = tl.load(x + rows * width + columns)
    rotated = hadamard.rotate_tile(tile, hadamard.hadamard_tile(tile.dtype), height, width)
    tl.store(out + rows * width + columns, rotated)
    scale = hadamard.int8_scale_of(tl.load(largest + tl.arange(0, height)))
    tl.store(scales + tl.arange(0, height), scale)
    tl.store(codes + rows * width + columns, hadamard.encode_int8(rotated * (1.0 / scale)[:, None]))


@pytest.mark.skipif(not has_triton, reason="Triton is not installed")
def test_in_a_kernel():
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3] = 0
    rotated = rotate_reference(x)
    largest = rotated.abs().amax(1)
    largest[5], largest[6] = float("inf"), float("nan")
    codes, scales, out = torch.empty(16, 128, dtype=torch.int8), torch.empty(16), torch.empty(16, 128)
    _kernel[(1,)](x, largest, codes, scales, out, height=16, width=128)
    assert torch.allclose(out, rotated, atol=1e-6)
    assert torch.equal(scales.nan_to_num(-1), int8_scale(largest).nan_to_num(-1))
    assert torch.equal(codes, encode_int8_reference(out, scales))
