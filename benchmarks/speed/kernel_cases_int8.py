"""The operations of int8 compute that `kernel_times.py` times, of a layer of a 7B model; backward it is in FP8.

What stands beside each is the same in e4m3 (see `kernel_cases_fp8.py`): what the rotation costs, and integers. Beside
the products it is `torch._int_mm` alone: sums in int32, without scales and without an adapter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.kernel_cases import EPS, Buffers, Case, R, Sizes
from benchmarks.speed.kernel_cases_fp8 import SAMPLE, empty_codes, group_shapes, nf4
from lsr_scale.kernels.dequantize_fp8 import dequantize_4bit_fp8, dequantize_int8_fp8, encode_weight
from lsr_scale.kernels.dequantize_rotated import (
    dequantize_4bit_rotated,
    dequantize_4bit_rotated_reference,
    dequantize_int8_rotated,
    dequantize_int8_rotated_reference,
    encode_rotated,
    encode_rotated_reference,
)
from lsr_scale.kernels.gemm_8bit import gemm_8bit
from lsr_scale.kernels.hadamard import rotate_reference
from lsr_scale.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from lsr_scale.kernels.rms_norm_quantize import rms_norm_quantize

# who makes the products, as `kernel_times.sums` knows it
OURS = "gemm_8bit in int8"


def int8_codes(b: Buffers, *shape: int) -> list[Tensor]:
    """Return random codes, as many tensors as there are sets."""
    return [torch.randint(-127, 128, shape, dtype=torch.int8, device=b.device) for _ in range(b.sets)]


def products(b: Buffers, s: Sizes) -> list[Case]:
    """Each group's product forward, with its adapter."""
    cases = []
    for group, n, k in group_shapes(s):
        x, weight = int8_codes(b, s.T, k), int8_codes(b, n, k)
        scales, row_scales = torch.rand(s.T, device=b.device) + 0.5, torch.rand(n, device=b.device) * 2.0**-12
        thin, up, out = b.rand(s.T, R), b.rand(n, R)[0], b.empty(s.T, n)

        def ours(i: int, x=x, weight=weight, scales=scales, by=row_scales, out=out, thin=thin, up=up) -> None:
            gemm_8bit(x[i], scales, weight[i], by, out[i], thin=thin[i], up=up)

        def exact(ours=ours, x=x, weight=weight, scales=scales, by=row_scales, out=out, thin=thin, up=up) -> list:
            ours(0)
            some = slice(0, SAMPLE)
            product = x[0][some].double() @ weight[0].double().t()
            product *= scales[some].double()[:, None] * by.double()
            return [(out[0][some], product + thin[0][some].double() @ up.double().t())]

        cases.append(
            Case(
                *(f"{OURS}: {group} forward", f"{s.T}x{n}x{k}", ours),
                flop=2.0 * s.T * n * k,
                alternative="torch._int_mm alone",
                other=lambda i, x=x, weight=weight: torch._int_mm(x[i], weight[i].t()),
                exact=exact,
            )
        )
    return cases


def weights(b: Buffers, s: Sizes) -> list[Case]:
    """Dequantization to rotated int8 of NF4, int8 and bf16, beside that to e4m3 in the same orientation."""
    cases = []
    for N, K in ((s.hidden, s.hidden), (s.inner, s.hidden), (s.hidden, s.inner)):
        packed, codes, plain = nf4(b, N, K), int8_codes(b, N, K), b.rand(N, K, scale=0.02)
        code_scales = torch.rand(N, device=b.device) / 50
        to_int8 = int8_codes(b, N, K), torch.rand(N, device=b.device) / 500
        to_e4m3 = empty_codes(b, N, K), torch.full((1,), 2.0**-11, device=b.device)

        def four(i: int, run: Callable, outs: list[Tensor], scales: Tensor, packed: list = packed) -> None:
            made = packed[i]
            first, rest = ("packed", "absmax", "code"), ("block_size", "nested")
            run(*(made[key] for key in first), outs[i], scales, **{key: made[key] for key in rest})

        def eight(
            i: int, run: Callable, outs: list[Tensor], scales: Tensor, codes: list = codes, by: Tensor = code_scales
        ) -> None:
            run(codes[i], by, outs[i], scales)

        def neither(i: int, run: Callable, outs: list[Tensor], scales: Tensor, plain: list = plain) -> None:
            run(plain[i], outs[i], scales)

        for give, run, reference, in_fp8, read in (
            (four, dequantize_4bit_rotated, dequantize_4bit_rotated_reference, dequantize_4bit_fp8, 0.516),
            (eight, dequantize_int8_rotated, dequantize_int8_rotated_reference, dequantize_int8_fp8, 1),
            (neither, encode_rotated, encode_rotated_reference, encode_weight, b.dtype.itemsize),
        ):

            def exact(give=give, run=run, reference=reference, to=to_int8) -> list:
                give(0, run, *to)
                expected = [torch.empty_like(to[0][0])]
                give(0, reference, expected, to[1])
                return [(to[0][0].float(), expected[0].double())]

            cases.append(
                Case(
                    *(run.__name__ + (" nested" if give is four else ""), f"{N}x{K}"),
                    lambda i, give=give, run=run, to=to_int8: give(i, run, *to),
                    bytes=N * K * (read + 1),
                    alternative="to e4m3",
                    other=lambda i, give=give, run=in_fp8, to=to_e4m3: give(i, run, *to),
                    exact=exact,
                )
            )
    return cases


def rows(b: Buffers, s: Sizes) -> list[Case]:
    """What activations are quantized by, beside the same to e4m3: alone, with an adapter's product, after RMSNorm."""
    T, rank, cases = s.T, 48, []
    scales = [torch.empty(T, device=b.device) for _ in range(b.sets)]
    for name, width in (("attention's output", s.hidden), ("SwiGLU's output", s.inner)):
        x, product = b.rand(T, width), b.empty(T, R)
        to_int8, to_e4m3 = int8_codes(b, T, width), empty_codes(b, T, width)
        projection = torch.zeros(R, width, device=b.device, dtype=b.dtype)
        projection[:rank] = torch.randn(rank, width, device=b.device, dtype=b.dtype) / width**0.5

        def alone(i: int, codes: list, x: list = x) -> None:
            quantize_rows(x[i], codes[i], scales[i])

        def with_product(
            i: int, codes: list, x: list = x, projection: Tensor = projection, product: list = product
        ) -> None:
            quantize_rows(x[i], codes[i], scales[i], projection=projection, product=product[i], rank=rank)

        def exact(
            run: Callable = with_product,
            x: list = x,
            codes: list = to_int8,
            projection: Tensor = projection,
            product: list = product,
        ) -> list:
            run(0, codes)
            expected, by = torch.empty_like(codes[0]), torch.empty_like(scales[0])
            quantize_rows_reference(x[0], expected, by)
            values = expected.double() * by.double()[:, None]
            product_of = x[0].double() @ projection.double().t()
            return [(codes[0].double() * scales[0].double()[:, None], values), (product[0], product_of)]

        for what, run, shape, check in (
            ("quantize_rows to int8", alone, f"{T}x{width}", None),
            ("quantize_rows to int8 with product", with_product, f"{T}x{width}, rank {rank}", exact),
        ):
            cases.append(
                Case(
                    *(f"{what}, {name}", shape, lambda i, run=run, codes=to_int8: run(i, codes)),
                    bytes=T * width * (b.dtype.itemsize + 1),
                    alternative="to e4m3",
                    other=lambda i, run=run, codes=to_e4m3: run(i, codes),
                    exact=check,
                )
            )
    return [*cases, norm(b, s, scales, rank)]


def norm(b: Buffers, s: Sizes, scales: list[Tensor], rank: int) -> Case:
    """RMSNorm that writes rotated int8 and the adapters' product; its error is that of int8 itself.

    A row's scale may be off by a rounding of bf16, so codes cannot be compared one by one.
    """
    T, K = s.T, s.hidden
    x, res, sums, xa = b.rand(T, K), b.rand(T, K), b.empty(T, K), b.empty(T, R)
    to_int8, to_e4m3 = int8_codes(b, T, K), empty_codes(b, T, K)
    weight = 1 + 0.1 * torch.randn(K, device=b.device, dtype=b.dtype)
    down = torch.zeros(R, K, device=b.device, dtype=b.dtype)
    down[:rank] = torch.randn(rank, K, device=b.device, dtype=b.dtype) / K**0.5

    def forward(i: int, codes: list[Tensor]) -> None:
        both = {"residual": res[i], "residual_out": sums[i]}
        rms_norm_quantize(x[i], weight, EPS, codes[i], scales[i], down=down, xa_out=xa[i], rank=rank, **both)

    def exact() -> list:
        forward(0, to_int8)
        v = (x[0].float() + res[0].float()).to(b.dtype).double()
        n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        return [
            (to_int8[0].double() * scales[0].double()[:, None], rotate_reference(n)),
            (xa[0], n @ down.double().t()),
        ]

    return Case(
        *("rms_norm_quantize to int8, residual", f"{T}x{K}, rank {rank}", lambda i: forward(i, to_int8)),
        bytes=T * K * (3 * b.dtype.itemsize + 1),
        alternative="to e4m3",
        other=lambda i: forward(i, to_e4m3),
        exact=exact,
    )


GROUPS = {"int8_products": products, "int8_weights": weights, "int8_rows": rows}
