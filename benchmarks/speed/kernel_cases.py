"""The operations that `kernel_times.py` times, of a layer of a 7B model: each with its alternative and exact result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor

from lsr_scale.kernels import attention as attention_ops
from lsr_scale.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from lsr_scale.kernels.dequantize import dequantize_4bit, dequantize_int8
from lsr_scale.kernels.output_gradients import output_gradients
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward
from lsr_scale.kernels.rms_norm_project import rms_norm_project
from lsr_scale.kernels.rotary import rotate
from lsr_scale.kernels.swiglu import swiglu, swiglu_backward
from lsr_scale.kernels.swiglu_pair_gradients import swiglu_pair_gradients
from lsr_scale.kernels.swiglu_project import swiglu_project

EPS = 1e-5
R = 64


@dataclass
class Case:
    """One operation: `run(i)` works on the i-th set of buffers, `exact()` returns pairs (result, float64) for set 0."""

    name: str
    shape: str
    run: Callable[[int], Any]
    bytes: float = 0
    flop: float = 0
    alternative: str = ""
    other: Callable[[int], Any] | None = None
    exact: Callable[[], list[tuple[Tensor, Tensor]]] | None = None


class Sizes:
    """Dimensions of one Mistral-7B layer, or with `tiny` of a toy that a CPU runs in a moment."""

    def __init__(self, tokens: int, tiny: bool) -> None:
        self.T = 32 if tiny else tokens
        self.hidden, self.inner, self.vocabulary = (64, 128, 256) if tiny else (4096, 14336, 32000)
        self.heads, self.kv_heads, self.head_dim = (4, 2, 16) if tiny else (32, 8, 128)
        self.length = 16 if tiny else min(2048, tokens)
        self.qkv = (self.heads + 2 * self.kv_heads) * self.head_dim


class Buffers:
    """Makes sets of random and empty tensors on a device, which take turns so that no cache holds them."""

    def __init__(self, device: str, sets: int) -> None:
        self.device, self.sets = device, sets
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def rand(self, *shape: int, scale: float = 1.0) -> list[Tensor]:
        """Return as many random tensors as there are sets."""
        return [scale * torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(self.sets)]

    def empty(self, *shape: int) -> list[Tensor]:
        """Return as many uninitialized tensors as there are sets."""
        return [torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(self.sets)]


def weights(b: Buffers, s: Sizes) -> list[Case]:
    """Dequantization into a group's matrix beside its R more columns: NF4, its scales quantized or not, and int8."""
    cases = []
    for N, K in ((s.hidden, s.hidden), (s.inner, s.hidden), (s.hidden, s.inner)):
        outs = b.empty(N, K + R)
        for nested in (True, False):
            made = [
                bnb_functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
                for w in b.rand(N, K, scale=0.02)
            ]

            def four(i: int, made: list = made, outs: list = outs) -> None:
                packed, state = made[i]
                extra = None
                if state.nested:
                    extra = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
                dequantize_4bit(packed, state.absmax, state.code, outs[i], block_size=state.blocksize, nested=extra)

            def equal(made: list = made, outs: list = outs, four: Callable = four, K: int = K) -> list:
                four(0)
                return [(outs[0][:, :K], bnb_functional.dequantize_4bit(*made[0]).double())]

            cases.append(
                Case(
                    "dequantize_4bit" + (" nested" if nested else ""),
                    f"{N}x{K}",
                    four,
                    bytes=N * K * (2.516 if nested else 2.5625) + 2 * N * R,
                    alternative="bitsandbytes",
                    other=lambda i, made=made: bnb_functional.dequantize_4bit(*made[i]),
                    exact=equal,
                )
            )
    N, K = s.inner, s.hidden
    codes = [torch.randint(-127, 128, (N, K), dtype=torch.int8, device=b.device) for _ in range(b.sets)]
    scales, outs = torch.rand(N, device=b.device), b.empty(N, K + R)

    def exact() -> list:
        dequantize_int8(codes[0], scales, outs[0])
        return [(outs[0][:, :K], codes[0].double() * scales.double()[:, None] / 127)]

    cases.append(
        Case(
            "dequantize_int8",
            f"{N}x{K}",
            lambda i: dequantize_int8(codes[i], scales, outs[i]),
            bytes=3 * N * K + 2 * N * R,
            alternative="bitsandbytes",
            other=lambda i: bnb_functional.int8_vectorwise_dequant(codes[i], scales).to(b.dtype),
            exact=exact,
        )
    )
    return cases


def norms(b: Buffers, s: Sizes) -> list[Case]:
    """RMSNorm with and without the adapters' product, forward and backward."""
    T, K = s.T, s.hidden
    x, res, grad = b.rand(T, K), b.rand(T, K), b.rand(T, K)
    out, sums, d_x, xa = b.empty(T, K + R), b.empty(T, K), b.empty(T, K), b.empty(T, R)
    weight = 1 + 0.1 * torch.randn(K, device=b.device, dtype=b.dtype)
    down = torch.zeros(R, K, device=b.device, dtype=b.dtype)
    down[:48] = torch.randn(48, K, device=b.device, dtype=b.dtype) / K**0.5
    rstd = rms_norm(x[0], weight, EPS, out[0][:, :K])
    both = {"residual": res, "residual_out": sums}

    def plain(i: int, **extra: list) -> None:
        rms_norm(x[i], weight, EPS, out[i][:, :K], **{name: buffers[i] for name, buffers in extra.items()})

    def project(i: int, **extra: list) -> None:
        buffers = {name: values[i] for name, values in extra.items()}
        rms_norm_project(x[i], weight, EPS, out[i], down, xa[i], rank=48, **buffers)

    def apart(i: int, **extra: list) -> None:
        plain(i, **extra)
        torch.mm(out[i][:, :K], down.t(), out=xa[i])
        out[i][:, K:] = xa[i]

    def exact() -> list:
        project(0)
        v = x[0].double()
        n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        return [(out[0][:, :K], n), (xa[0], n @ down.double().t())]

    size = 2 * T * K
    return [
        Case("rms_norm", f"{T}x{K}", plain, bytes=2 * size),
        Case("rms_norm, residual", f"{T}x{K}", lambda i: plain(i, **both), bytes=4 * size),
        Case(
            *("rms_norm_project", f"{T}x{K}, rank 48", project),
            bytes=2 * size,
            alternative="rms_norm, GEMM, copy",
            other=apart,
            exact=exact,
        ),
        Case(
            *("rms_norm_project, residual", f"{T}x{K}, rank 48", lambda i: project(i, **both)),
            bytes=4 * size,
            alternative="rms_norm, GEMM, copy",
            other=lambda i: apart(i, **both),
        ),
        Case(
            *("rms_norm_backward, residual", f"{T}x{K}"),
            lambda i: rms_norm_backward(grad[i], x[i], weight, rstd, d_x[i], residual_grad=res[i]),
            bytes=4 * size,
        ),
    ]


def feed_forward(b: Buffers, s: Sizes) -> list[Case]:
    """SwiGLU with and without the adapters' products, forward and backward."""
    T, F, r = s.T, s.inner, 16
    gate_up, grad = b.rand(T, 2 * F), b.rand(T, F)
    out, d_gate_up, xa = b.empty(T, F + R), b.empty(T, 2 * F + R), b.rand(T, R)
    ds = b.rand(T, R)
    down = torch.zeros(R, F, device=b.device, dtype=b.dtype)
    down[:r] = torch.randn(r, F, device=b.device, dtype=b.dtype) / F**0.5
    h = b.empty(T, F)

    def apart(i: int) -> None:
        swiglu(gate_up[i], out[i][:, :F])
        torch.mm(out[i][:, :F], down.t(), out=xa[i])
        out[i][:, F:] = xa[i]

    def pairs(i: int) -> Any:
        inner = d_gate_up[i][:, : 2 * F]
        return swiglu_pair_gradients(grad[i], gate_up[i], xa[i], (0, r), (r, r), ds[i], r, inner)

    def separate(i: int) -> None:
        inner = d_gate_up[i][:, : 2 * F]
        swiglu_backward(grad[i], gate_up[i], inner, h[i])
        for rows, columns in ((slice(0, F), slice(0, r)), (slice(F, 2 * F), slice(r, 2 * r))):
            inner[:, rows].t() @ xa[i][:, columns]
        ds[i][:, :r].t() @ h[i]

    def exact() -> list:
        grads = pairs(0)
        gate, up = gate_up[0].double().chunk(2, 1)
        sigmoid = gate.sigmoid()
        d_gate = grad[0].double() * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = grad[0].double() * gate * sigmoid
        wide = xa[0].double()
        expected = [d_gate.t() @ wide[:, :r], d_up.t() @ wide[:, r : 2 * r]]
        return [*zip(grads[:2], expected, strict=True), (d_gate_up[0][:, :F], d_gate)]

    size = 2 * T * F
    return [
        Case("swiglu", f"{T}x{F}", lambda i: swiglu(gate_up[i], out[i][:, :F]), bytes=3 * size),
        Case(
            *("swiglu_project", f"{T}x{F}, rank {r}"),
            lambda i: swiglu_project(gate_up[i], out[i], down, xa[i], rank=r),
            bytes=3 * size,
            alternative="swiglu, GEMM, copy",
            other=apart,
        ),
        Case(
            *("swiglu_backward", f"{T}x{F}"),
            lambda i: swiglu_backward(grad[i], gate_up[i], d_gate_up[i][:, : 2 * F]),
            bytes=5 * size,
        ),
        Case(
            *("swiglu_pair_gradients", f"{T}x{F}, ranks {r}", pairs),
            bytes=5 * size,
            alternative="swiglu_backward with h, three GEMMs",
            other=separate,
            exact=exact,
        ),
    ]


def thin(b: Buffers, s: Sizes) -> list[Case]:
    """Both products of an output gradient, RoPE, and the loss."""
    T, cases = s.T, []
    for name, N in (("o or down", s.hidden), ("qkv", s.qkv)):
        grad, xa = b.rand(T, N + R), b.rand(T, R)
        up = torch.zeros(N, R, device=b.device, dtype=b.dtype)
        up[:, :16] = torch.randn(N, 16, device=b.device, dtype=b.dtype)
        offsets = torch.zeros(-(-N // 64), dtype=torch.int32, device=b.device)

        def once(i: int, g: list = grad, xa: list = xa, up: Tensor = up, offsets: Tensor = offsets, N: int = N) -> Any:
            return output_gradients(g[i][:, :N], xa[i], up, offsets, 16, ds_out=g[i][:, N:])

        def twice(i: int, g: list = grad, xa: list = xa, up: Tensor = up, N: int = N) -> None:
            torch.mm(g[i][:, :N], up, out=g[i][:, N:])
            g[i][:, :N].t() @ xa[i][:, :16]

        def exact(once: Callable = once, g: list = grad, xa: list = xa, up: Tensor = up, N: int = N) -> list:
            ds, d_up = once(0)
            wide = g[0][:, :N].double()
            return [(ds, wide @ up.double()), (d_up, wide.t() @ xa[0][:, :16].double())]

        size = 2 * T * N
        cases.append(Case("output_gradients", f"{T}x{N} ({name})", once, size, 0, "two GEMMs", twice, exact))
    heads = b.rand(T, (s.heads + s.kv_heads) * s.head_dim)
    cos = torch.randn(s.length, s.head_dim, device=b.device, dtype=b.dtype)

    def turn(i: int) -> None:
        view = heads[i].unflatten(1, (-1, s.head_dim))
        rotate(view, cos, cos, view)

    cases.append(Case("rotate, in place", f"{T}x{heads[0].shape[1]}", turn, bytes=4 * heads[0].numel()))
    rows = min(T, 2048)
    logits, labels = b.rand(rows, s.vocabulary), torch.randint(s.vocabulary, (rows,), device=b.device)
    cases.append(
        Case(
            *("cross_entropy and gradient", f"{rows}x{s.vocabulary}"),
            lambda i: cross_entropy(logits[i], labels, gradient=True),
            bytes=4 * rows * s.vocabulary,
            alternative="plain torch",
            other=lambda i: cross_entropy_reference(logits[i], labels, gradient=True),
        )
    )
    return cases


def products(b: Buffers, s: Sizes) -> list[Case]:
    """Each group's GEMMs with R more columns, forward and input gradient, beside the same without them."""
    cases = []
    for name, N, K in (
        ("qkv", s.qkv, s.hidden),
        ("o", s.hidden, s.hidden),
        ("gate_up", 2 * s.inner, s.hidden),
        ("down", s.hidden, s.inner),
    ):
        x, grad = b.rand(s.T, K + R), b.rand(s.T, N + R)
        matrix = torch.randn(N + R, K + R, device=b.device, dtype=b.dtype) / K**0.5
        plain = matrix[:N, :K].contiguous()
        shape, flop = f"{s.T}x{N}x{K}", 2.0 * s.T * N * K
        cases += [
            Case(
                *(f"{name} forward, R={R}", shape),
                lambda i, x=x, m=matrix, N=N: x[i] @ m[:N].t(),
                flop=flop,
                alternative="R=0",
                other=lambda i, x=x, m=plain, K=K: x[i][:, :K] @ m.t(),
            ),
            Case(
                *(f"{name} input gradient, R={R}", shape),
                lambda i, g=grad, m=matrix, K=K: g[i] @ m[:, :K],
                flop=flop,
                alternative="R=0",
                other=lambda i, g=grad, m=plain, N=N: g[i][:, :N] @ m,
            ),
        ]
    return cases


def attentions(b: Buffers, s: Sizes) -> list[Case]:
    """Causal attention by the chosen backend, forward and backward, beside `scaled_dot_product_attention`'s choice."""
    batch = s.T // s.length
    q, k, v = (b.rand(batch, s.length, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads))
    grad, sequences = b.rand(batch, s.length, s.heads, s.head_dim), attention_ops.Sequences(s.head_dim**-0.5)
    out, saved = attention_ops.attention(q[0], k[0], v[0], sequences)
    flop = 2.0 * s.T * s.length * s.heads * s.head_dim
    chosen = attention_ops.choose_backend(q[0], k[0], sequences)
    return [
        Case(
            *(f"attention ({chosen})", f"{batch}x{s.length}, {s.heads}/{s.kv_heads} heads"),
            lambda i: attention_ops.attention(q[i], k[i], v[i], sequences),
            flop=flop,
            alternative="scaled_dot_product_attention",
            other=lambda i: attention_ops.attention_reference(q[i], k[i], v[i], sequences),
        ),
        Case(
            *(f"attention_backward ({chosen})", f"{batch}x{s.length}, {s.heads}/{s.kv_heads} heads"),
            lambda i: attention_ops.attention_backward(grad[i], q[0], k[0], v[0], out, saved, sequences),
            flop=2.5 * flop,
        ),
    ]


GROUPS = {
    "weights": weights,
    "norms": norms,
    "feed_forward": feed_forward,
    "thin": thin,
    "products": products,
    "attention": attentions,
}
