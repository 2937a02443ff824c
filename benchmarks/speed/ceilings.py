"""What a machine gives at best for the shapes of a run: copies, grouped GEMMs, attention; see `floors.floor_ms`."""

import functools
import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.providers import compute_of
from benchmarks.speed.providers.fused import no_fp8_reason


class Ceilings:
    """What the machine gives at best, for the shapes of this run; see `throughput.floor_ms`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def build(self) -> None:
        """Nothing: operands are made when they are needed."""
        torch.zeros(1, device=self.config["device"])

    def free_memory(self) -> None:
        """Give back what was allocated."""
        gc.collect()
        torch.cuda.empty_cache()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measure and return all ceilings for `tokens` tokens in sequences of `seq_len`."""
        tokens, shape = request["tokens"], self.config["shape"]
        measured = {"copy_bytes_per_s": copy_bandwidth(), **gemms(shape, tokens)}
        self.free_memory()
        eight_bit = any(compute_of(provider) != "bf16" for provider in self.config["providers"])
        if eight_bit and no_fp8_reason(torch.device(self.config["device"])) is None:
            measured |= fp8_gemms(shape, tokens)
            self.free_memory()
        return {"ceilings": {**measured, **attention(shape, tokens // request["seq_len"], request["seq_len"])}}


def median_ms(function: Any, seconds: float = 0.4) -> float:
    """Return the median time of a call on the GPU, after three to warm up."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    count = max(5, min(200, int(seconds / max(1e-5, time.perf_counter() - began))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


@functools.cache
def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * median_ms(lambda: target.copy_(source)))


def group_sizes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the input and output features of a layer's four groups of linears."""
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    hidden, intermediate = shape["hidden"], shape["intermediate"]
    return {
        "qkv": (hidden, queries + 2 * keys),
        "o": (queries, hidden),
        "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
    }


def gemms(shape: dict[str, int], tokens: int) -> dict[str, float]:
    """Return the times of one layer's four grouped linears and of lm_head, in bf16, forward and dX."""
    hidden, sizes = shape["hidden"], group_sizes(shape)
    new = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    operands = {name: (new(tokens, k), new(n, k) * k**-0.5) for name, (k, n) in sizes.items()}
    outputs = {name: new(tokens, n) for name, (_, n) in sizes.items()}

    def forward(names: tuple[str, ...]) -> None:
        for name in names:
            torch.mm(operands[name][0], operands[name][1].t(), out=outputs[name])

    medians: dict[str, float] = {"layer_gemm_recompute_ms": median_ms(lambda: forward(("qkv", "o", "gate_up")))}
    grads = {name: torch.empty_like(x) for name, (x, _) in operands.items()}
    dy = {name: torch.randn_like(y) for name, y in outputs.items()}

    def both() -> None:
        for name, (x, weight) in operands.items():
            torch.mm(x, weight.t(), out=outputs[name])
            torch.mm(dy[name], weight, out=grads[name])

    medians["layer_gemm_ms"] = median_ms(both)
    for made in (operands, outputs, grads, dy):
        made.clear()
    x, weight = new(tokens, hidden), new(shape["vocab"], hidden) * hidden**-0.5
    logits = new(tokens, shape["vocab"])
    grad = torch.empty_like(x)

    def head() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad)

    medians["lm_head_ms"] = median_ms(head)
    return medians


def scaled_mm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """Return `[T, N]` bf16 from codes `[T, K]` and `[N, K]` by `torch._scaled_mm`, scales as that takes them.

    A scale per row of both: `[T, 1]` and `[1, N]`.
    """
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": weight_scales.shape[0] == 1}
    return torch._scaled_mm(x, weight.t(), x_scales, weight_scales, **options)


def fp8_gemms(shape: dict[str, int], tokens: int) -> dict[str, Any]:
    """Return the times of one layer's four grouped linears in FP8, forward and dX, and by which product.

    The faster of `torch._scaled_mm` with a scale per row, where it takes that, and this library's own product.
    """
    from lsr_scale.kernels.fp8 import E4M3
    from lsr_scale.kernels.gemm_8bit import gemm_8bit

    def codes(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16).to(E4M3)

    scales = torch.ones(tokens, device="cuda")

    def operands(n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16)
        return codes(tokens, k), codes(n, k), torch.full((1, n), 2.0**-8, device="cuda"), out

    # an input gradient is a product like the forward one, with the weight transposed
    sizes = group_sizes(shape)
    ahead = {name: operands(n, k) for name, (k, n) in sizes.items()}
    back = {name: operands(k, n) for name, (k, n) in sizes.items()}
    recomputed = [ahead[name] for name in ("qkv", "o", "gate_up")]

    def by_torch(x: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor) -> None:
        scaled_mm(x, scales[:, None], weight, weight_scales)

    def by_us(x: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor) -> None:
        gemm_8bit(x, scales, weight, weight_scales[0, :1], out)

    measured: dict[str, dict[str, Any]] = {}
    for name, product in (("torch._scaled_mm, a scale per row", by_torch), ("lsr_scale's gemm_8bit", by_us)):

        def multiply(pairs: Any, product: Any = product) -> None:
            for each in pairs:
                product(*each)

        try:
            measured[name] = {
                "layer_gemm_fp8_ms": median_ms(lambda: multiply([*ahead.values(), *back.values()])),
                "layer_gemm_recompute_fp8_ms": median_ms(lambda: multiply(recomputed)),
            }
        except (RuntimeError, NotImplementedError) as error:
            print(f"FP8 products, {name}: {str(error).splitlines()[0]}", flush=True)
    if not measured:
        raise RuntimeError("no FP8 product takes these shapes")
    best = min(measured, key=lambda name: measured[name]["layer_gemm_fp8_ms"])
    return {**measured[best], "fp8_product": best, "fp8_products": measured}


def attention(shape: dict[str, int], batch: int, seq_len: int) -> dict[str, Any]:
    """Return the times of causal attention, forward and with backward, on the fastest backend (named)."""
    size = shape["head_dim"]
    new = lambda heads: torch.randn(batch, seq_len, heads, size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (new(n).transpose(1, 2).requires_grad_() for n in (shape["heads"], shape["kv_heads"], shape["kv_heads"]))
    grad = torch.randn(q.shape, device="cuda", dtype=torch.bfloat16)
    by_backend: dict[str, dict[str, Any]] = {}
    repeats = shape["heads"] // shape["kv_heads"]
    wide = [x.detach().repeat_interleave(repeats, 1).requires_grad_() for x in (k, v)]
    grouped, repeated = ((q, k, v), True), ((q, *wide), False)
    cases = {
        "cudnn": (SDPBackend.CUDNN_ATTENTION, grouped),
        "cudnn, keys and values repeated": (SDPBackend.CUDNN_ATTENTION, repeated),
        "flash": (SDPBackend.FLASH_ATTENTION, grouped),
    }

    def direct() -> Tensor:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]

    cases["cudnn, called directly"] = (SDPBackend.CUDNN_ATTENTION, grouped)
    for name, (backend, (inputs, gqa)) in cases.items():
        usual = functools.partial(functional.scaled_dot_product_attention, *inputs, is_causal=True, enable_gqa=gqa)
        forward = direct if "directly" in name else usual

        def both(forward: Any = forward, inputs: tuple[Tensor, ...] = inputs) -> None:
            torch.autograd.grad(forward(), inputs, grad)

        try:
            with sdpa_kernel(backend):
                with torch.no_grad():
                    ahead = median_ms(forward)
                by_backend[name] = {"attention_forward_ms": ahead, "attention_ms": median_ms(both)}
        except RuntimeError as error:
            print(f"attention, {name}: {str(error).splitlines()[0]}", flush=True)
    if not by_backend:
        raise RuntimeError("no fused attention backend takes these shapes")
    best = min(by_backend, key=lambda name: by_backend[name]["attention_ms"])
    return {**by_backend[best], "attention_backend": best}
