"""Attention: which kernel computes it, and that one whose results are wrong is not used."""

import itertools
import logging
import types

import pytest
import torch
from torch.nn import functional

from lsr_scale.kernels import attention as module
from lsr_scale.kernels.attention import Sequences, SharedPrefixes, attention, attention_backward, attention_reference
from lsr_scale.kernels.packed_attention import packed_attention

CPU = torch.device("cpu")


def forward(q, k, v, mask, keep, dropout, causal, debug, scale):
    """Answer as PyTorch 2.11's `_scaled_dot_product_cudnn_attention`, in float32."""
    out = functional.scaled_dot_product_attention(
        *(x.float() for x in (q, k, v)), is_causal=causal, scale=scale, enable_gqa=True
    )
    nothing = torch.empty(0)
    return out.to(q.dtype), torch.zeros(q.shape[:3]), nothing, nothing, 64, 64, nothing, nothing, nothing


def backward(grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, scale):
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.float().requires_grad_() for x in (q, k, v)]
        again = functional.scaled_dot_product_attention(*inputs, is_causal=causal, scale=scale, enable_gqa=True)
    return tuple(g.to(q.dtype) for g in torch.autograd.grad(again, inputs, grad.float().clone()))


def with_kernels(monkeypatch, one=forward, other=backward):
    names = {"_scaled_dot_product_cudnn_attention": one, "_scaled_dot_product_cudnn_attention_backward": other}
    monkeypatch.setattr(module, "aten", types.SimpleNamespace(**{k: v for k, v in names.items() if v is not None}))


def self_test(dtype=torch.bfloat16, heads=(4, 2, 64)):
    return module._self_test("cudnn", CPU, dtype, *heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(14, 2, 64), (32, 8, 128), (9, 3, 64), (8, 8, 80), (16, 1, 256)])
def test_a_kernel_whose_results_are_right_is_used(dtype, heads, monkeypatch):
    with_kernels(monkeypatch)
    assert self_test(dtype, heads) is None
    with torch.inference_mode():
        assert self_test(dtype, heads) is None


def refused(*args, **kwargs):
    raise RuntimeError("No available kernel.\n  Aborting execution.")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (lambda *args, **more: (*forward(*args, **more), None), backward, "returns another form than expected"),
        (lambda *args, **more: forward(*args, **more)[0], backward, "returns another form than expected"),
        (forward, lambda *args, **more: backward(*args, **more)[:2], "returns another form than expected"),
        (lambda q, k, v, causal, scale: forward(q, k, v, None, 1, 0, causal, 0, scale), backward, "another form"),
        (None, backward, "returns another form than expected"),
        (lambda q, *args, **more: forward(q.transpose(1, 2), *args, **more), backward, "."),
        (forward, lambda *args, **more: backward(*args, **more)[::-1], "returns shape"),
        (lambda *args, scale: forward(*args, scale=8 * scale), backward, "differ from the reference by"),
        (forward, lambda *args, scale: backward(*args, scale=8 * scale), "differ from the reference by"),
        (
            forward,
            lambda *args, **more: tuple(x * float("nan") for x in backward(*args, **more)),
            "its results in a self-test are not finite",
        ),
        (refused, backward, "No available kernel. Aborting execution."),
    ],
)
def test_a_kernel_whose_results_are_wrong_is_not_used_and_the_reason_is_given(one, other, expected, monkeypatch):
    with_kernels(monkeypatch, one, other)
    actual = self_test()
    assert actual is not None
    assert expected in actual


def test_the_reason_is_logged_once_and_the_next_backend_is_chosen(monkeypatch, caplog):
    module.unavailable_reason.cache_clear()
    monkeypatch.setattr(module, "_self_test", lambda backend, *_: {"cudnn": "it has gone"}.get(backend))
    monkeypatch.setattr(module, "_cudnn_was_enabled", lambda: True)
    q = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0), shape=(1, 64, 4, 64))
    with caplog.at_level(logging.WARNING):
        assert [module.choose_backend(q, q, Sequences(1.0)) for _ in range(3)] == ["flash"] * 3  # pyright: ignore
        assert module.choose_backend(q, q, Sequences(1.0, mask=torch.ones(1))) == "sdpa"  # pyright: ignore
    assert [record.getMessage() for record in caplog.records] == [
        "attention does not use PyTorch's cudnn kernel: it has gone"
    ]
    module.unavailable_reason.cache_clear()


SHORT = Sequences(1.0, cu_seqlens=torch.tensor([0, 16, 32, 64]), max_seqlen=32)


@pytest.mark.parametrize("why", [None, "CompilationError: sm_70"])
def test_short_documents_have_a_kernel_of_their_own_where_it_works(why, monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    module.unavailable_reason.cache_clear()
    monkeypatch.setattr(module, "_self_test", lambda backend, *_: why if backend == "packed" else None)
    q = types.SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0), shape=torch.Size((1, 64, 4, 64))
    )
    chosen = [module.choose_backend(q, q, SHORT) for _ in range(2)]  # pyright: ignore
    assert chosen == ["flash" if why else "packed"] * 2
    long = Sequences(1.0, cu_seqlens=torch.tensor([0, 64]), max_seqlen=64)
    monkeypatch.setattr(module, "_SHORT", 63)
    assert module.choose_backend(q, q, long) == "flash"  # pyright: ignore
    said = [record.getMessage() for record in caplog.records]
    assert said == ([f"attention does not use the kernel for short documents: {why}"] if why else [])
    module.unavailable_reason.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_short_documents_is_tested_like_the_others(dtype, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    heads = CPU, dtype, 6, 2, 64
    assert module._self_test("packed", *heads) is None
    monkeypatch.setattr(
        module, "packed_attention", lambda *args: packed_attention(*args[:3], args[3], 8 * args[4], args[5])
    )
    assert "differ from the reference by" in str(module._self_test("packed", *heads))

    class OutOfResourcesError(Exception):
        pass

    def refuse(*_):
        raise OutOfResourcesError("shared memory,\n Required: 110592")

    monkeypatch.setattr(module, "packed_attention", refuse)
    assert module._self_test("packed", *heads) == "OutOfResourcesError: shared memory, Required: 110592"


def test_the_self_test_draws_no_random_numbers(monkeypatch):
    with_kernels(monkeypatch)
    before = torch.get_rng_state()
    self_test()
    assert torch.equal(torch.get_rng_state(), before)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu), "cpu"])


def exact(q, k, v, allowed, grad):
    """Return output and gradients in float64 by the definition; where a token sees nothing its output is 0."""
    q, k, v = inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return [out, *torch.autograd.grad(out, inputs, grad.double())]


def shared_prefixes_of(length, scale, window, device):
    """Return sequences of four documents that begin like the one before, and which token attends to which."""
    first, second, third = length // 2, length // 4, length // 8
    rows = [list(range(first))]
    for begins, own in ((first // 2, second), (first // 2 + 3, third), (1, length - first - second - third)):
        taken = sum(map(len, rows[:1])) if len(rows) == 1 else max(map(max, rows)) + 1
        rows.append(rows[-1][:begins] + list(range(taken, taken + own)))
    allowed = torch.zeros(length, length, dtype=torch.bool, device=device)
    for row in rows:
        for at, token in enumerate(row):
            seen = row[: at + 1] if window is None else row[max(0, at + 1 - window) : at + 1]
            allowed[token] = False
            allowed[token, seen] = True
    bounds = lambda sizes: torch.tensor([0, *sizes], device=device).cumsum(0).int()  # noqa: E731
    own = [first, second, third, length - first - second - third]
    keys = SharedPrefixes(
        torch.tensor([*itertools.chain(*rows)], device=device), bounds(map(len, rows)), max(map(len, rows))
    )
    return Sequences(scale, None, bounds(own), max(own), window, keys), allowed[None, None]


@cuda
@pytest.mark.parametrize("kind", ["left", "right", "both", "window", "packed", "shared", "shared window", "plain"])
@pytest.mark.parametrize("length", [64, 192, 320, 63, 101])
@pytest.mark.parametrize("logits", [1.0, 100.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_against_float64_whatever_the_mask(head_dim, logits, length, kind, device):
    if device == "cpu" and (length not in (63, 64) or head_dim != 64):
        pytest.skip("a CPU has one kernel for all of them")
    generator = torch.Generator().manual_seed(length)
    batch, heads, kv_heads = (1 if kind.split()[0] in ("packed", "shared") else 4), 14, 2
    q, k, v, grad = (
        torch.randn(batch, length, n, head_dim, generator=generator, dtype=torch.float64)
        .mul(size)
        .to(device, torch.bfloat16)
        for n, size in ((heads, logits**0.5), (kv_heads, logits**0.5), (kv_heads, 1.0), (heads, 1.0))
    )
    position = torch.arange(length, device=device)
    causal = (position[:, None] >= position)[None, None]
    sequences, real = Sequences(head_dim**-0.5), torch.ones(batch, length, dtype=torch.bool, device=device)
    if kind in ("left", "right", "both"):
        lengths = torch.tensor([length, max(1, length // 3), length // 2, 5], device=device)[:, None]
        real = position < lengths if kind == "right" else position >= length - lengths
        if kind == "both":
            real = real & (position < length - 3)
        allowed = causal & real[:, None, None, :]
        sequences = Sequences(head_dim**-0.5, mask=allowed)
    elif kind == "window":
        allowed = causal & (position[:, None] - position < 17)
        sequences = Sequences(head_dim**-0.5, window=17)
    elif kind == "packed":
        ends = torch.tensor([0, 5, length // 2, length], dtype=torch.int32, device=device)
        document = torch.searchsorted(ends, position, right=True)
        allowed = causal & (document[:, None] == document)
        sequences = Sequences(head_dim**-0.5, cu_seqlens=ends, max_seqlen=length)
    elif kind.startswith("shared"):
        window = 17 if kind.endswith("window") else None
        sequences, allowed = shared_prefixes_of(length, head_dim**-0.5, window, device)
    else:
        allowed = causal
    grad = grad * real[:, :, None, None]
    out, saved = attention(q, k, v, sequences)
    actual = [out, *attention_backward(grad, q, k, v, out, saved, sequences)]
    expected = exact(q, k, v, allowed.expand(batch, 1, length, length), grad)
    actual[0], expected[0] = actual[0] * real[:, :, None, None], expected[0] * real[:, :, None, None]
    for name, one, other in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        assert torch.isfinite(one).all(), f"{name} is not finite"
        error = float((one.double() - other).detach().norm() / other.norm())
        assert error < 0.05, f"{name}: {error:.3f} from float64"


@cuda
def test_tokens_that_see_nothing_give_zeros_and_no_gradients(device):
    """Padding on the left: what it gives must not be NaN, which a later layer would carry to real tokens."""
    q = torch.randn(2, 64, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    allowed = torch.ones(64, 64, dtype=torch.bool, device=device).tril().repeat(2, 1, 1, 1)
    allowed[1, :, :, :20] = False
    out = attention_reference(q, q, q, Sequences(0.125, mask=allowed))
    out.square().sum().backward()
    assert not out[1, :20].any()
    assert torch.isfinite(q.grad).all()
    assert not q.grad[1, :20].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_choosing_a_kernel_leaves_the_gpus_random_numbers_alone():
    module.unavailable_reason.cache_clear()
    before = torch.cuda.get_rng_state()
    q = torch.ones(2, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert module.choose_backend(q, q, Sequences(1.0)) in ("cudnn", "flash", "sdpa")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    if torch.cuda.get_device_capability() == (9, 0):
        assert module.choose_backend(q, q, Sequences(1.0)) == "cudnn"
