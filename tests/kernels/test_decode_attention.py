"""Attention of a new token to a cache: against float64, whatever is in the memory that is not a row's, on every GPU."""

import pytest
import torch

from lsr_scale.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    decode_attention_triton,
)
from tests.kernels.checks import OnGpu, assert_close_to_float64, error, launched, poisoned

# rows, heads, key/value heads, head's size, length of the memory
SHAPES = [(3, 4, 2, 64, 96), (2, 14, 2, 64, 200), (1, 9, 3, 16, 33), (2, 3, 3, 80, 70), (5, 32, 1, 24, 64)]
FLOORS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
both = pytest.mark.parametrize("run", [decode_attention_triton, decode_attention_reference])


def inputs(shape, dtype, device, logits=1.0):
    """Return queries, a poisoned cache with the tokens of each row in it, and where these are."""
    rows, heads, kv_heads, size, length = shape
    generator = torch.Generator().manual_seed(0)
    random = lambda *sizes: torch.randn(*sizes, generator=generator).to(device, dtype)  # noqa: E731
    q = random(rows, 1, heads, size + 8)[:, 0, :, :size] * logits
    place = torch.tensor([length - 5], device=device)
    first = torch.arange(rows, device=device) * 7 % (length - 6)
    first[-1] = length - 5  # it sees itself alone
    keys, values = poisoned((2, rows, kv_heads, length, size), dtype, device)
    for row, begin in enumerate(first.tolist()):
        for part in (keys, values):
            part[row, :, begin : length - 4] = random(kv_heads, length - 4 - begin, size)
    return q, keys, values, first, place, size**-0.5


def exact(q, keys, values, first, place, scale):
    """Return the output in float64, row by row, of what is a row's alone."""
    rows = []
    for row, begin in enumerate(first.tolist()):
        part = slice(begin, int(place) + 1)
        key, value = (x[row, :, part].double().repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (keys, values))
        weights = (torch.einsum("hd,htd->ht", q[row].double(), key) * scale).softmax(-1)
        rows.append(torch.einsum("ht,htd->hd", weights, value))
    return torch.stack(rows)


@both
@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, run, device):
    if run is decode_attention_triton:
        pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    for logits in (1.0, 30.0):
        given = inputs(shape, dtype, device, logits)
        expected = exact(*given)
        assert_close_to_float64(run(*given), expected, expected.to(dtype), FLOORS[dtype])


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("block_t", [16, 64])
def test_in_parts_of_which_some_are_empty(splits, block_t, device):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    given = inputs(SHAPES[1], torch.float32, device)
    actual = decode_attention_triton(*given, splits=splits, block_t=block_t)
    assert error(actual, exact(*given)) < 1e-6


def test_a_row_that_is_not_finite_changes_no_other(device):
    q, keys, values, *rest = inputs(SHAPES[0], torch.float32, device)
    expected = decode_attention(q, keys, values, *rest)
    keys[1] = torch.nan
    actual = decode_attention(q, keys, values, *rest)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert actual[1].isnan().all()


def test_float64_is_exact():
    given = inputs(SHAPES[0], torch.float64, "cpu")
    assert error(decode_attention(*given), exact(*given)) < 1e-14


# rows, heads, key/value heads, head's size: Qwen2.5-0.5B, few and many rows, Mistral-7B, and what takes most memory
MODELS = ((256, 14, 2, 64), (1, 14, 2, 64), (4, 32, 8, 128), (1, 8, 4, 256))


def decoded(*shapes):
    """Decode rows of models, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows, heads, kv_heads, size in shapes:
            keys = OnGpu.empty(rows, kv_heads, 1024, size, dtype=dtype)
            q = OnGpu.empty(rows, heads, size, dtype=dtype)
            first, place = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            decode_attention(q, keys, keys, first, place, 0.125)


# for sm_89 Triton makes what it makes for sm_86
@pytest.mark.parametrize(("shapes", "capabilities"), [(MODELS, (80, 120)), (MODELS[-1:], (86, 90, 100))])
def test_it_fits_into_every_gpu(shapes, capabilities):
    launches = launched(decoded, *shapes, shared_bytes=99 * 1024, capabilities=capabilities)
    assert {name for name, _, _ in launches} == {"_decode_kernel", "_combine_kernel"}
    assert {capability for _, capability, _ in launches} == set(capabilities)
    assert max(used for _, _, used in launches) <= 99 * 1024
