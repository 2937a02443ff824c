"""Attention within packed documents: against float64, whatever their lengths, on every GPU."""

import itertools

import pytest
import torch

from lsr_scale.kernels import packed_attention as module
from lsr_scale.kernels.packed_attention import (
    bounds_reference,
    document_bounds,
    packed_attention,
    packed_attention_backward,
    packed_attention_reference,
)
from tests.kernels.checks import OnGpu, assert_close_to_float64, launched

# rows, heads, key/value heads, head's size, and the documents' lengths in each row
SHAPES = [
    (1, 4, 2, 64, [5, 60, 1, 64, 0, 0, 3, 130, 7]),
    (2, 3, 3, 24, [70, 31]),
    (2, 3, 1, 16, [1, 1, 0, 17, 63, 2]),
    (1, 2, 1, 128, [200]),
]
FLOORS = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")


def bounds_of(rows, lengths, device):
    """Return where documents of these lengths begin in each of some rows, with empty ones at the end."""
    every = [0, *itertools.accumulate(lengths * rows)]
    return torch.tensor([*every, every[-1], every[-1]], dtype=torch.int32, device=device)


def inputs(shape, dtype, device):
    """Return queries, keys, values and a gradient, as views of wider memory full of NaN, and the documents."""
    rows, heads, kv_heads, size, lengths = shape
    length = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((rows, length, heads + 2 * kv_heads + 1, size + 8), torch.nan, dtype=dtype, device=device)
    random = torch.randn(rows, length, heads + 2 * kv_heads, size, generator=generator, dtype=torch.float64)
    wide[:, :, :-1, :size] = random.to(device, dtype)
    q, k, v, _ = wide[..., :size].split([heads, kv_heads, kv_heads, 1], 2)
    grad = torch.randn(rows, length, heads, size, generator=generator, dtype=torch.float64).to(device, dtype)
    return q, k, v, grad, bounds_of(rows, lengths, device)


def with_gradients(q, k, v, grad, starts, dtype):
    """Return output and gradients of the reference, computed in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = packed_attention_reference(*leaves, starts, q.shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 9), *((dtype, None) for dtype in FLOORS)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:4])))
def test_against_float64(shape, dtype, window, device):
    q, k, v, grad, cu_seqlens = inputs(shape, dtype, device)
    scale = q.shape[-1] ** -0.5
    out, saved = packed_attention(q, k, v, cu_seqlens, scale, window)
    actual = [out, *packed_attention_backward(grad, q, k, v, out, saved, scale)]
    starts, _ = bounds_reference(cu_seqlens, *q.shape[:2], window)
    exact = with_gradients(q, k, v, grad, starts, torch.float64)
    for one, expected in zip(actual, exact, strict=True):
        assert_close_to_float64(one, expected, expected.to(dtype), FLOORS[dtype])


def test_the_reference_attends_within_documents():
    q, k, v, _, _ = inputs(SHAPES[0], torch.float64, "cpu")
    cu_seqlens = torch.tensor([0, 100, 270], dtype=torch.int32)
    starts, ends = bounds_reference(cu_seqlens, 1, 270)
    out = packed_attention_reference(q, k, v, starts, 0.125)
    for begin, end in ((0, 100), (100, 270)):
        assert (starts[:, begin:end] == begin).all()
        assert (ends[:, begin:end] == end).all()
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, begin:end].transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.125, enable_gqa=True
        )
        torch.testing.assert_close(out[:, begin:end], alone.transpose(1, 2))


@pytest.mark.parametrize("window", [None, 1, 40])
def test_bounds_of_documents_of_which_some_are_empty(window, device):
    lengths = [0, 3, 0, 0, 500, 1, 1, 95, 0]
    cu_seqlens = bounds_of(3, lengths, device)
    actual = document_bounds(cu_seqlens, 3, sum(lengths), window)
    for one, expected in zip(actual, bounds_reference(cu_seqlens, 3, sum(lengths), window), strict=True):
        assert torch.equal(one, expected)
        assert (one.diff(dim=1) >= 0).all()


def test_a_window_longer_than_any_row_bounds_nothing(device):
    cu_seqlens = bounds_of(2, [3, 97], device)
    for find in (document_bounds, bounds_reference):
        for one, expected in zip(find(cu_seqlens, 2, 100, 2**31 - 1), find(cu_seqlens, 2, 100), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 65])
def test_whatever_the_layout_of_what_it_is_given(length, rows, device):
    """`[B, H, S, D]` in memory, of which the stride of a row's only token says nothing; and the same for all rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(rows, heads, length, 16, generator=generator).to(device).transpose(1, 2) for heads in (6, 2, 2, 6)
    )
    v = v[:1].expand(rows, -1, -1, -1)
    cu_seqlens = bounds_of(rows, [0, length // 2, 0, length - length // 2], device)
    out, saved = packed_attention(q, k, v, cu_seqlens, 0.25)
    actual = [out, *packed_attention_backward(grad, q, k, v, out, saved, 0.25)]
    starts, _ = bounds_reference(cu_seqlens, rows, length)
    for one, expected in zip(actual, with_gradients(q, k, v, grad, starts, torch.float64), strict=True):
        torch.testing.assert_close(one, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_finite_changes_no_other(device):
    q, k, v, grad, cu_seqlens = inputs((3, 2, 1, 16, [30, 71]), torch.float32, device)

    def computed():
        out, saved = packed_attention(q, k, v, cu_seqlens, 0.25)
        return [out, *packed_attention_backward(grad, q, k, v, out, saved, 0.25)]

    before = computed()
    for x in (q, k, v):
        x[1] = torch.nan
    for one, other in zip(computed(), before, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert one[1].isnan().all()


# heads, key/value heads, head's size, rows, tokens: SmolLM2, ones, which Triton compiles into kernels, and Mistral-7B
MODELS = ((9, 3, 64, 2, 576), (1, 1, 16, 1, 1), (32, 8, 128, 2, 576))


def trained(*shapes):
    """Train on packed rows of models' shapes."""
    for heads, kv_heads, size, rows, length in shapes:
        q, k = OnGpu.empty(rows, length, heads, size), OnGpu.empty(rows, length, kv_heads, size)
        out, saved = packed_attention(q, k, k, torch.zeros(18, dtype=torch.int32), 0.125)
        packed_attention_backward(out, q, k, k, out, saved, 0.125)


# for sm_89 Triton makes what it makes for sm_86; the last model takes most memory
@pytest.mark.parametrize(("shapes", "capabilities"), [(MODELS, (80,)), (MODELS[-1:], (86, 90, 100, 120))])
def test_it_fits_into_every_gpu(shapes, capabilities):
    launches = launched(trained, *shapes, shared_bytes=99 * 1024, capabilities=capabilities)
    names = {name for name in vars(module) if name.endswith("_kernel")}
    assert {name for name, _, _ in launches} == names
    assert {capability for _, capability, _ in launches} == set(capabilities)
    assert max(used for _, _, used in launches) <= 99 * 1024
