"""A 4-bit and an 8-bit layer are tried: are their weights what was quantized, and their gradients right."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from lsr_scale.doctor.report import Finding
from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized

_REINSTALL = 'pip install --force-reinstall --no-deps "bitsandbytes>=0.50,<0.51"'


def try_quantized(kind: str, device: torch.device) -> Finding:
    """Quantize a small layer, run it in eval mode and then backward: the weight stays, the gradient is right."""
    name = f"{kind} on {device.type}"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            dense = torch.randn(96, 128, dtype=torch.bfloat16)
            x = torch.randn(4, 128, dtype=torch.bfloat16, device=device)
        model = nn.Sequential(_quantized_layer(kind, dense).to(device))
        freeze_quantized(model)
        layer: Any = model[0]
        stored = layer.weight.data.clone()
        model.eval()(x)
        if not torch.equal(layer.weight.data, stored):
            return Finding("fast paths", name, "an eval-mode forward changed the stored weight", "bad", _REINSTALL)
        x.requires_grad_()
        model.train()(x).sum().backward()
        weight = dequantize(layer, torch.bfloat16)
        error = ((weight.float().cpu() - dense.float()).norm() / dense.float().norm()).item()
        assert x.grad is not None
        expected = weight.float().sum(0)
        gradient_error = ((x.grad[0].float() - expected).norm() / expected.norm()).item()
        limit = {"nf4": 0.15, "int8": 0.02}[kind]
        if error > limit or gradient_error > 0.05:
            found = (
                f"weight error {error:.3f} (expected below {limit}), gradient error {gradient_error:.3f} (below 0.05)"
            )
            return Finding("fast paths", name, found, "bad", _REINSTALL)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding("fast paths", name, found, "bad", _REINSTALL)
    return Finding("fast paths", name, f"works; weights keep {100 * (1 - error):.1f} %, gradients are right")


def _quantized_layer(kind: str, dense: torch.Tensor) -> nn.Module:
    layers: Any = bnb.nn  # whose parameters take more than torch's, by __new__
    out_features, in_features = dense.shape
    if kind == "int8":
        layer = layers.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = layers.Int8Params(dense.clone(), has_fp16_weights=False, requires_grad=False)
    else:
        layer = layers.Linear4bit(in_features, out_features, bias=False, compute_dtype=dense.dtype, quant_type=kind)
        layer.weight = layers.Params4bit(dense.clone(), requires_grad=False, quant_type=kind, module=layer)
    return layer
