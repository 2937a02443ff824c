"""Every operation of the fused path against its bound, and against what does the same without it.

    python -m benchmarks.speed.kernel_times --out benchmarks/results/kernel_times/NAME.json    (one GPU, a minute)

One layer of a 7B model at T tokens, bf16, random data, buffers that take turns so that no cache holds them. A row has
the median time, the bytes that must be moved (each input read once, each output written once) or the operations, the
share of the bound (bytes over the copy bandwidth of the same run), the error against float64 (relative, Frobenius), and
the time of the alternative named beside it; for GEMMs that is the same product without the adapter's columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor

from benchmarks.command_line import new_file, script_parser
from lsr_scale import files
from lsr_scale.kernels import attention as attention_ops
from lsr_scale.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from lsr_scale.kernels.dequantize import dequantize_4bit, dequantize_int8
from lsr_scale.kernels.output_gradients import output_gradients
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_project
from lsr_scale.kernels.rotary import rotate
from lsr_scale.kernels.swiglu import swiglu, swiglu_backward, swiglu_pair_gradients
from lsr_scale.kernels.swiglu_project import swiglu_project

EPS = 1e-5
R = 64


@dataclass
class Case:
    """One operation: `run(i)` works on the i-th set of buffers, `exact()` returns pairs (found, float64) for set 0."""

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


class Bench:
    """Makes buffers on a device, and times."""

    def __init__(self, device: str, sets: int) -> None:
        self.device, self.sets = device, sets
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def rand(self, *shape: int, scale: float = 1.0) -> list[Tensor]:
        """Return as many random tensors as there are sets."""
        return [scale * torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(self.sets)]

    def empty(self, *shape: int) -> list[Tensor]:
        """Return as many uninitialized tensors as there are sets."""
        return [torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(self.sets)]

    def milliseconds(self, run: Callable[[int], Any]) -> float:
        """Return the median time of a call, the sets of buffers taking turns."""
        if self.device != "cuda":
            run(0)
            return 0.0
        from triton.testing import do_bench

        turn = iter(range(10**9))
        return do_bench(lambda: run(next(turn) % self.sets), warmup=15, rep=60, return_mode="median")


def weights(b: Bench, s: Sizes) -> list[Case]:
    """Dequantization into the pitched matrix of a group, NF4 with and without double quantization, and int8."""
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


def norms(b: Bench, s: Sizes) -> list[Case]:
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
        rms_norm(x[i], weight, EPS, out[i][:, :K], **{name: held[i] for name, held in extra.items()})

    def project(i: int, **extra: list) -> None:
        held = {name: values[i] for name, values in extra.items()}
        rms_norm_project(x[i], weight, EPS, out[i], down, xa[i], rank=48, **held)

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


def feed_forward(b: Bench, s: Sizes) -> list[Case]:
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
        found = pairs(0)
        gate, up = gate_up[0].double().chunk(2, 1)
        sigmoid = gate.sigmoid()
        d_gate = grad[0].double() * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = grad[0].double() * gate * sigmoid
        wide = xa[0].double()
        expected = [d_gate.t() @ wide[:, :r], d_up.t() @ wide[:, r : 2 * r]]
        return [*zip(found[:2], expected, strict=True), (d_gate_up[0][:, :F], d_gate)]

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


def thin(b: Bench, s: Sizes) -> list[Case]:
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


def products(b: Bench, s: Sizes) -> list[Case]:
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


def attentions(b: Bench, s: Sizes) -> list[Case]:
    """Causal attention by the chosen backend, forward and backward, beside `scaled_dot_product_attention`'s choice."""
    batch = s.T // s.length
    q, k, v = (b.rand(batch, s.length, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads))
    grad, sequences = b.rand(batch, s.length, s.heads, s.head_dim), attention_ops.Sequences(s.head_dim**-0.5)
    out, kept = attention_ops.attention(q[0], k[0], v[0], sequences)
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
            lambda i: attention_ops.attention_backward(grad[i], q[0], k[0], v[0], out, kept, sequences),
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


def copy_bandwidth(b: Bench, size: int) -> float:
    """Return the bytes per second, read and written, of a copy of `size` bytes on the device."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=b.device) for _ in range(2))
    spent = b.milliseconds(lambda _: target.copy_(source))
    return 2e3 * size / spent if spent else 1.0


def measured(case: Case, b: Bench, bytes_per_s: float) -> dict[str, Any]:
    """Return the row of a case; a case that fails is a row that says so."""
    row: dict[str, Any] = {"name": case.name, "shape": case.shape, "status": "ok"}
    try:
        if case.exact is not None:
            pairs = case.exact()
            row["error"] = max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)
        row["ms"] = b.milliseconds(case.run)
        if case.other is not None:
            row |= {"alternative": case.alternative, "alternative_ms": b.milliseconds(case.other)}
    except Exception as error:
        return row | {"status": "error", "detail": f"{type(error).__name__}: {error}"[:400]}
    if row["ms"] and case.bytes:
        row |= {"gb_per_s": case.bytes / row["ms"] / 1e6, "share_of_bound": case.bytes / bytes_per_s * 1e3 / row["ms"]}
    elif row["ms"] and case.flop:
        row["tflop_per_s"] = case.flop / row["ms"] / 1e9
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measure all groups, or some, and write the JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all?")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    b, s = Bench(device, 1 if args.tiny else 3), Sizes(args.tokens, args.tiny)
    bytes_per_s = copy_bandwidth(b, 2**20 if args.tiny else 2**30)
    rows: list[dict[str, Any]] = []
    for name in args.groups:
        for case in GROUPS[name](b, s):
            rows.append(measured(case, b, bytes_per_s))
            row = rows[-1]
            share = f"{row['share_of_bound']:.2f} of copy" if "share_of_bound" in row else ""
            other = f"{row['alternative']} {row['alternative_ms']:.4f}" if "alternative_ms" in row else ""
            found = f"{row['ms']:.4f} ms" if "ms" in row else row.get("detail", "")
            print(f"{row['name']:34} {row['shape']:26} {found:12} {share:14} {other}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    config = {"tokens": s.T, "groups": args.groups, "tiny": args.tiny, "copy_bytes_per_s": bytes_per_s}
    files.write_json(args.out, {"env": files.environment(), "config": config, "rows": rows})
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
