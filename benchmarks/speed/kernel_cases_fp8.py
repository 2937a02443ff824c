"""The operations of FP8 compute that `kernel_times.py` times, of a layer of a 7B model.

`products` decides between scales per row and per block: this library's product, whose last step is the adapter's,
beside `torch._scaled_mm` with a scale per row of both operands; and that with one per 1x128 of the activations and
128x128 of the weights, beside bf16. All have the adapter's product.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor

from benchmarks.speed.ceilings import scaled_mm
from benchmarks.speed.kernel_cases import EPS, Buffers, Case, R, Sizes
from lsr_scale.kernels.dequantize import dequantize_4bit, dequantize_int8
from lsr_scale.kernels.dequantize_fp8 import (
    dequantize_4bit_fp8,
    dequantize_4bit_fp8_reference,
    dequantize_int8_fp8,
    dequantize_int8_fp8_reference,
    encode_weight,
    encode_weight_reference,
)
from lsr_scale.kernels.fp8 import E4M3, encode_reference, power_of_two_scale
from lsr_scale.kernels.gemm_8bit import gemm_8bit
from lsr_scale.kernels.quantize_rows import quantize_rows
from lsr_scale.kernels.rms_norm import rms_norm, rms_norm_backward
from lsr_scale.kernels.rms_norm_project import rms_norm_project
from lsr_scale.kernels.rms_norm_quantize import rms_norm_quantize

# who makes the products, as `kernel_times.sums` knows it
OURS = "gemm_8bit in e4m3"
BLOCK = 128
SAMPLE = 256  # rows that are compared with float64


def codes_like(b: Buffers, *shape: int) -> list[Tensor]:
    """Return random codes, as many tensors as there are sets."""
    return [x.to(E4M3) for x in b.rand(*shape)]


def empty_codes(b: Buffers, *shape: int) -> list[Tensor]:
    """Return uninitialized codes, as many tensors as there are sets."""
    return [torch.empty(shape, dtype=E4M3, device=b.device) for _ in range(b.sets)]


def block_scales(b: Buffers, T: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return scales of 1 as `torch._scaled_mm` takes them: `[T, K / 128]`, and `[K / 128, N / 128]` of the weight."""
    columns, rows = -(-K // BLOCK), -(-N // BLOCK)
    a = torch.ones(columns, T, device=b.device).t()
    weight = torch.ones(rows, -(-columns // 4) * 4, device=b.device)[:, :columns].t()
    return a, weight


def group_shapes(s: Sizes) -> list[tuple[str, int, int]]:
    """Return the name, N and K of each of a layer's groups of linears."""
    return [
        ("qkv", s.qkv, s.hidden),
        ("o", s.hidden, s.hidden),
        ("gate_up", 2 * s.inner, s.hidden),
        ("down", s.hidden, s.inner),
    ]


def nf4(b: Buffers, N: int, K: int) -> list[dict[str, Any]]:
    """Return random weights in NF4, its scales quantized: the arguments of kernels that dequantize them."""
    made: list[Any] = [
        bnb_functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in b.rand(N, K, scale=0.02)
    ]
    return [
        {
            **{"packed": packed, "absmax": state.absmax, "code": state.code, "block_size": state.blocksize},
            "nested": (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize),
        }
        for packed, state in made
    ]


def products(b: Buffers, s: Sizes) -> list[Case]:
    """Each group's product, forward and input gradient, with its adapter: three ways in FP8, and in bf16."""
    cases, on_gpu = [], b.device == "cuda"
    for group, N, K in group_shapes(s):
        for forward in (True, False):
            n, k = (N, K) if forward else (K, N)
            name = f"{group} {'forward' if forward else 'input gradient'}"
            x, weight = codes_like(b, s.T, k), codes_like(b, n, k)
            scales, scale = torch.rand(s.T, device=b.device) + 0.5, torch.full((1,), 2.0**-6, device=b.device)
            thin, out = b.rand(s.T, R), b.empty(s.T, n)
            # the adapter's matrices lie as they do in training: up [n, R] forward, down [R, n] backward
            pair = (b.rand(n, R) if forward else b.rand(R, n))[0]
            shape, flop = f"{s.T}x{n}x{k}", 2.0 * s.T * n * k
            right = pair.t() if forward else pair
            given: dict[str, Tensor] = {"up": pair} if forward else {"down": pair}
            rows = scales[:, None], scale.expand(1, n).contiguous()
            blocks = block_scales(b, s.T, n, k)
            wide = [torch.cat([v.to(b.dtype), t], 1) for v, t in zip(x, thin, strict=True)]
            matrix = torch.cat([weight[0].to(b.dtype), right.t()], 1)

            def ours(i: int, x=x, weight=weight, scales=scales, scale=scale, out=out, thin=thin, given=given) -> None:
                gemm_8bit(x[i], scales, weight[i], scale, out[i], thin=thin[i], **given)

            def theirs(i: int, by: Any, x=x, weight=weight, thin=thin, right=right) -> None:
                scaled_mm(x[i], by[0], weight[i], by[1]).addmm_(thin[i], right)

            def exact(
                ours=ours, x=x, weight=weight, scales=scales, scale=scale, thin=thin, right=right, out=out
            ) -> list:
                ours(0)
                some = slice(0, SAMPLE)
                product = x[0][some].float().double() @ weight[0].float().double().t()
                product *= (scales[some] * scale).double()[:, None]
                return [(out[0][some], product + thin[0][some].double() @ right.double())]

            cases.append(
                Case(
                    *(f"{OURS}: {name}", shape, ours),
                    flop=flop,
                    alternative="torch._scaled_mm by rows, addmm" if on_gpu else "",
                    other=(lambda i, by=rows, theirs=theirs: theirs(i, by)) if on_gpu else None,
                    exact=exact,
                )
            )
            if on_gpu:
                cases.append(
                    Case(
                        *(f"torch._scaled_mm by blocks, addmm: {name}", shape),
                        lambda i, by=blocks, theirs=theirs: theirs(i, by),
                        flop=flop,
                        alternative="bf16 with R more columns",
                        other=lambda i, x=wide, matrix=matrix: x[i] @ matrix.t(),
                    )
                )
    return cases


def weights(b: Buffers, s: Sizes) -> list[Case]:
    """Dequantization to e4m3 in both orientations, of NF4, int8 and bf16, beside that to bf16."""
    cases = []
    for N, K in ((s.hidden, s.hidden), (s.inner, s.hidden), (s.hidden, s.inner)):
        scale = torch.full((1,), 2.0**-11, device=b.device)
        tables = nf4(b, N, K)
        int8 = [torch.randint(-127, 128, (N, K), dtype=torch.int8, device=b.device) for _ in range(b.sets)]
        row_scales, plain, to_bf16 = torch.rand(N, device=b.device) / 50, b.rand(N, K, scale=0.02), b.empty(N, K)

        def four(
            i: int, out: list, run: Callable = dequantize_4bit_fp8, tables=tables, scale=scale, **way: bool
        ) -> None:
            run(**tables[i], out=out[i], weight_scale=scale, **way)

        def eight(
            i: int, out: list, run: Callable = dequantize_int8_fp8, codes=int8, by=row_scales, scale=scale, **way: bool
        ) -> None:
            run(codes[i], by, out[i], scale, **way)

        def neither(i: int, out: list, run: Callable = encode_weight, plain=plain, scale=scale, **way: bool) -> None:
            run(plain[i], out[i], scale, **way)

        def bf16_of_four(i: int, tables=tables, out=to_bf16) -> None:
            dequantize_4bit(**tables[i], out=out[i])

        def bf16_of_eight(i: int, codes=int8, by=row_scales, out=to_bf16) -> None:
            dequantize_int8(codes[i], by, out[i])

        for name, run, reference, read, other in (
            ("dequantize_4bit_fp8 nested", four, dequantize_4bit_fp8_reference, 0.516, bf16_of_four),
            ("dequantize_int8_fp8", eight, dequantize_int8_fp8_reference, 1, bf16_of_eight),
            ("encode_weight", neither, encode_weight_reference, b.dtype.itemsize, None),
        ):
            for transposed in (False, True):
                out = empty_codes(b, *((K, N) if transposed else (N, K)))

                def exact(run=run, out=out, reference=reference, way=transposed) -> list:
                    run(0, out, transposed=way)
                    expected = [torch.empty_like(out[0])]
                    run(0, expected, reference, transposed=way)
                    return [(out[0].float(), expected[0].float().double())]

                cases.append(
                    Case(
                        *(f"{name}{', transposed' if transposed else ''}", f"{N}x{K}"),
                        lambda i, run=run, out=out, way=transposed: run(i, out, transposed=way),
                        bytes=N * K * (read + 1),
                        alternative="to bf16" if other else "",
                        other=other,
                        exact=exact,
                    )
                )
    return cases


def rows(b: Buffers, s: Sizes) -> list[Case]:
    """What activations and gradients are quantized by: alone, with an adapter's product, within the norms' kernels."""
    T, K, rank = s.T, s.hidden, 48
    cases = []
    scales = [torch.empty(T, device=b.device) for _ in range(b.sets)]
    for name, width in (("attention's output", K), ("gate_up's gradient", 2 * s.inner)):
        x, codes, product = b.rand(T, width), empty_codes(b, T, width), b.empty(T, R)
        projection = torch.zeros(R, width, device=b.device, dtype=b.dtype)
        projection[:rank] = torch.randn(rank, width, device=b.device, dtype=b.dtype) / width**0.5

        def alone(i: int, x=x, codes=codes) -> None:
            quantize_rows(x[i], codes[i], scales[i])

        def with_product(i: int, x=x, codes=codes, projection=projection, product=product) -> None:
            quantize_rows(x[i], codes[i], scales[i], projection=projection, product=product[i], rank=rank)

        def apart(i: int, x=x, alone=alone, projection=projection, product=product) -> None:
            alone(i)
            torch.mm(x[i], projection.t(), out=product[i])

        def exact(run=with_product, x=x, codes=codes, projection=projection, product=product) -> list:
            run(0)
            return [*beside_reference(x[0], codes[0], scales[0]), (product[0], x[0].double() @ projection.double().t())]

        size = T * width * (b.dtype.itemsize + 1)
        cases += [
            Case(f"quantize_rows, {name}", f"{T}x{width}", alone, bytes=size),
            Case(
                *(f"quantize_rows with product, {name}", f"{T}x{width}, rank {rank}", with_product),
                bytes=size,
                alternative="quantize_rows, GEMM",
                other=apart,
                exact=exact,
            ),
        ]
    return cases + norms(b, s, scales, rank)


def norms(b: Buffers, s: Sizes, scales: list[Tensor], rank: int) -> list[Case]:
    """RMSNorm that writes codes and the adapters' product, and its backward pass that writes codes beside."""
    T, K = s.T, s.hidden
    x, res, grad = b.rand(T, K), b.rand(T, K), b.rand(T, K)
    wide, sums, d_x, xa, codes = b.empty(T, K + R), b.empty(T, K), b.empty(T, K), b.empty(T, R), empty_codes(b, T, K)
    weight = 1 + 0.1 * torch.randn(K, device=b.device, dtype=b.dtype)
    down = torch.zeros(R, K, device=b.device, dtype=b.dtype)
    down[:rank] = torch.randn(rank, K, device=b.device, dtype=b.dtype) / K**0.5
    rstd = rms_norm(x[0], weight, EPS, wide[0][:, :K])

    def forward(i: int) -> None:
        both = {"residual": res[i], "residual_out": sums[i]}
        rms_norm_quantize(x[i], weight, EPS, codes[i], scales[i], down=down, xa_out=xa[i], rank=rank, **both)

    def forward_apart(i: int) -> None:
        both = {"residual": res[i], "residual_out": sums[i]}
        rms_norm_project(x[i], weight, EPS, wide[i], down, xa[i], rank=rank, **both)
        quantize_rows(wide[i][:, :K], codes[i], scales[i])

    def backward(i: int) -> None:
        rms_norm_backward(grad[i], x[i], weight, rstd, d_x[i], residual_grad=res[i], codes=codes[i], scales=scales[i])

    def backward_apart(i: int) -> None:
        rms_norm_backward(grad[i], x[i], weight, rstd, d_x[i], residual_grad=res[i])
        quantize_rows(d_x[i], codes[i], scales[i])

    def exact_forward() -> list:
        forward(0)
        summed = (x[0].float() + res[0].float()).to(b.dtype)
        v = summed.double()
        n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        rounded = n.to(b.dtype)
        return [*beside_reference(rounded, codes[0], scales[0]), (xa[0], n @ down.double().t())]

    def exact_backward() -> list:
        backward(0)
        return beside_reference(d_x[0], codes[0], scales[0])

    size, item = T * K, b.dtype.itemsize
    return [
        Case(
            *("rms_norm_quantize, residual", f"{T}x{K}, rank {rank}", forward),
            bytes=size * (3 * item + 1),
            alternative="rms_norm_project, quantize_rows",
            other=forward_apart,
            exact=exact_forward,
        ),
        Case(
            *("rms_norm_backward to codes too, residual", f"{T}x{K}", backward),
            bytes=size * (4 * item + 1),
            alternative="rms_norm_backward, quantize_rows",
            other=backward_apart,
            exact=exact_backward,
        ),
    ]


def beside_reference(x: Tensor, codes: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what codes and scales stand for, and what those of `x` should."""
    expected = power_of_two_scale(x.abs().amax(1).float())
    values = encode_reference(x, expected).double() * expected.double()[:, None]
    return [(codes.double() * scales.double()[:, None], values)]


GROUPS = {"fp8_products": products, "fp8_weights": weights, "fp8_rows": rows}
