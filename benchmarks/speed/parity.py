"""The gate of the throughput benchmark: fused layers must be as near to float32 as plain bfloat16 is.

Two layers of the run's shapes and base, factors away from their start, random tokens. The loss, the layers' output, the
gradient of their input and of every factor are computed three ways: unfused in float32 on the very weights that
bfloat16 computes with (the reference), unfused in bfloat16, and fused. Errors are relative by norm, tensor by tensor,
and their root mean square over the factors of one kind (one factor may have four entries, and luck). The fused one may
be twice that of plain bfloat16 plus 2e-3, whatever is recomputed and whether weights are cached.

In FP8 and int8 the fused layers are compared with the same recipe in plain torch (`eight_bit_simulation.py`) instead of
plain bfloat16, and may be 1.25 times as far from float32 plus 2e-3.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.eight_bit_simulation import simulated
from benchmarks.speed.providers import PROVIDERS, find_provider
from benchmarks.speed.providers.fused import FusedAdapter, no_fp8_reason
from lsr_scale.fused.layer_state import Recompute
from lsr_scale.fused.patching import Compute

TOKENS = 512
FLOOR = 2e-3
# by what is computed in: how many times as far from float32 as the same without fusing
ALLOWED = {"bf16": 2.0, "fp8": 1.25, "int8": 1.25}
# what is recomputed, and whether dequantized weights are cached
VARIANTS: tuple[tuple[Recompute, bool], ...] = (("none", False), ("mlp", False), ("full", False), ("none", True))


class Parity:
    """Checks the methods of ours that are to be measured; a worker's provider."""

    def __init__(self, config: dict[str, Any]) -> None:
        values = {**config["values"], "num_hidden_layers": 2}
        self.config = {**config, "values": values, "shape": {**config["shape"], "layers": 2}}
        owners = [find_provider(name) for name in config["providers"] if name in PROVIDERS]
        own = [each for each in owners if issubclass(each, FusedAdapter) and each.method]
        self.methods: dict[tuple[str, Any], dict[str, Any]] = {
            (str(each.method), each.compute): each.options for each in own
        }

    def build(self) -> None:
        """Nothing: models are made one after the other."""

    def free_memory(self) -> None:
        """Free what was allocated."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return a row for each method and variant, with what is wrong with it."""
        device = torch.device(self.config["device"])
        rows = []
        for (method, compute), options in self.methods.items():
            if compute != "bf16" and no_fp8_reason(device):
                continue  # its providers are missing, and say why
            rows += self.check(method, options, compute)
            self.free_memory()
        return {"parity": rows}

    def check(self, method: str, options: dict[str, Any], compute: Compute) -> list[dict[str, Any]]:
        """Return the rows of one method."""
        import lsr_scale

        provider = find_provider("frozen")(self.config)
        provider.method, provider.options = method, options
        provider.make()
        model = provider.model.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for factor in (p for p in model.parameters() if p.requires_grad):
                # of the size that it has: an update of zero would hide what is wrong
                noise = torch.randn(factor.shape, generator=generator).to(factor)
                factor.add_(noise * factor.abs().mean().clamp_min(0.02))
        length = min(TOKENS // 2, min(seq_len for _, seq_len in self.config["points"]))
        vocabulary = self.config["shape"]["vocab"]
        ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(provider.device)
        with nullcontext() if compute == "bf16" else simulated(model, compute):
            plain = results(model, ids)
        fused = {}
        for recompute, cache_weights in VARIANTS:
            report = lsr_scale.fuse(model, recompute=recompute, cache_weights=cache_weights, compute=compute)
            if report.unfused or report.not_eight_bit:
                raise RuntimeError(f"{method}: layers do not run fused: {report}")
            fused[recompute, cache_weights] = results(model, ids)
            lsr_scale.unfuse(model)
        exact = results(in_float32(model), ids)
        return [row_of(method, compute, variant, values, plain, exact) for variant, values in fused.items()]


def results(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return a step's loss, the layers' output, the gradient of their input and of every factor, in float64."""
    seen: dict[str, Tensor] = {}
    base = model.get_base_model().model

    def keep_input(module: Any, inputs: Any, out: Tensor) -> Tensor:
        seen["input"] = out.detach().requires_grad_()
        return seen["input"]

    def keep_output(module: Any, inputs: Any) -> None:
        seen["output"] = inputs[0]

    hooks = [
        base.embed_tokens.register_forward_hook(keep_input),
        base.norm.register_forward_pre_hook(keep_output),
    ]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    computed = {"loss": loss, "output": seen["output"], "input gradient": seen["input"].grad, **grads}
    return {name: value.detach().double() for name, value in computed.items()}


def in_float32(model: Any) -> Any:
    """Return the model computing in float32, in place, on the weights that bfloat16 computes with."""
    from lsr_scale.fused.linear_groups import base_layer
    from lsr_scale.layers.frozen_linear import dequantize

    for module in model.modules():
        base = base_layer(module)
        if base is not module and hasattr(module, "base_layer") and not isinstance(base, nn.Embedding):
            quantized = base.weight.dtype in (torch.uint8, torch.int8)
            weight = dequantize(base, torch.bfloat16) if quantized else base.weight
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if base.bias is not None:
                plain.bias = nn.Parameter(base.bias.float(), requires_grad=False)
            module.base_layer = plain
    return model.float()


def row_of(
    method: str,
    compute: str,
    variant: tuple[str, bool],
    fused: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
) -> dict[str, Any]:
    """Return what one variant's errors are, beside those of the same without fusing."""
    beside = "plain bfloat16" if compute == "bf16" else "the simulation"
    problems, worst = [], 0.0
    if fused.keys() != exact.keys() or plain.keys() != exact.keys():
        problems.append(f"{method} {compute} {variant}: results of {len(fused)} tensors, expected {len(exact)}")
    kinds: dict[str, list[str]] = {}
    errors: dict[str, list[float]] = {}
    for name in fused.keys() & plain.keys() & exact.keys():
        # ...q_proj.lsr_down_left.default, ...q_proj.lora_A.default.weight
        kind = name.removesuffix(".weight").split(".")[-2] if "." in name else name
        kinds.setdefault(kind, []).append(name)
    for kind, names in kinds.items():
        ours, theirs = (rms([relative(each[name], exact[name]) for name in names]) for each in (fused, plain))
        worst = max(worst, ours / (theirs + FLOOR))
        errors[kind] = [ours, theirs]
        if not ours <= ALLOWED[compute] * theirs + FLOOR:
            problems.append(f"{method} {compute} {variant}: {kind} is off by {ours:.1e}, {beside} by {theirs:.1e}")
    recompute, cache_weights = variant
    return {
        **{"method": method, "compute": compute, "recompute": recompute, "cache_weights": cache_weights},
        **{"tensors": len(fused), "worst_ratio": worst, "errors": errors, "problems": sorted(problems)[:10]},
    }


def relative(value: Tensor, exact: Tensor) -> float:
    """Return `|value - exact| / |exact|`."""
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))


def rms(values: list[float]) -> float:
    """Return the root mean square."""
    return (sum(value * value for value in values) / len(values)) ** 0.5
