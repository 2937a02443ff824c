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


def gemms(shape: dict[str, int], tokens: int) -> dict[str, float]:
    """Return the times of one layer's four grouped linears and of lm_head, in bf16, forward and dX."""
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    hidden, intermediate = shape["hidden"], shape["intermediate"]
    sizes = {
        "qkv": (hidden, queries + 2 * keys),
        "o": (queries, hidden),
        "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
        "lm_head": (hidden, shape["vocab"]),
    }
    new = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    operands = {name: (new(tokens, k), new(n, k) * k**-0.5) for name, (k, n) in sizes.items() if name != "lm_head"}
    outputs = {name: new(tokens, n) for name, (_, n) in sizes.items() if name != "lm_head"}

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
