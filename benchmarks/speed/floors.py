"""What a training step costs at least: shapes of models, operations, and the floor of its time.

**The floor** is the time that a step with a frozen base and free adapters would take at ceilings measured in the same
run (`floor_ms`): grouped GEMMs (qkv, o, gate+up, down; forward and dX), lm_head's GEMMs, cuDNN attention, and, at the
bandwidth of a device copy, the bytes of two dequantizations of every linear layer and of norms, RoPE and SwiGLU (per
token and layer 12 D + 3 F forward and 12 D + 6 F backward, where D = 2 hidden and F = 2 intermediate bytes). With
checkpointing each layer is computed again up to SwiGLU's output: all forward GEMMs but down's, forward attention, and
the forward traffic.
"""

import json
from typing import Any

from benchmarks import ROOT

MODELS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
TINY = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512},
}
# dense bf16, TFLOP/s, from the data sheets
NOMINAL_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0}
# bytes read and written per weight by one dequantization to bf16; NF4 with double quantization has a byte of scale per
# 64 weights and a float32 per 256 of those
DEQUANTIZATION_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64 + 2, "int8": 1 + 2, "bf16": 0.0}
STORED_BYTES = {"nf4": 0.516, "int8": 1.0, "bf16": 2.0}


def model_values(model: str, layers: int | None = None) -> dict[str, Any]:
    """Return the values of a model's Transformers configuration, from the table in this library.

    Mistral's sliding window is left out (as in v0.2 and later), so that attention is causal at any length.
    """
    if model == "tiny":
        values = dict(TINY)
    else:
        table = ROOT / "lsr_scale" / "model" / "known_configs.json"
        entries = json.loads(table.read_text(encoding="utf-8"))
        values = dict(next(entry["config"] for entry in entries if MODELS[model] in entry["names"]))
    if "sliding_window" in values:
        values["sliding_window"] = None
    if layers is not None:
        values["num_hidden_layers"] = layers
    return values


def shape_of(values: dict[str, Any]) -> dict[str, int]:
    """Return the dimensions that cost time: hidden, intermediate, layers, heads, kv_heads, head_dim, vocab."""
    heads = values["num_attention_heads"]
    return {
        "hidden": values["hidden_size"],
        "intermediate": values["intermediate_size"],
        "layers": values["num_hidden_layers"],
        "heads": heads,
        "kv_heads": values.get("num_key_value_heads", heads),
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "vocab": values["vocab_size"],
    }


def layer_weights(shape: dict[str, int]) -> int:
    """Return the number of weights in one layer's seven linears."""
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    return shape["hidden"] * (2 * queries + 2 * keys + 3 * shape["intermediate"])


def floor_ms(
    shape: dict[str, int], tokens: int, base: str, checkpointing: str, ceilings: dict[str, float]
) -> dict[str, float]:
    """Return the parts of a step's floor in ms, and their sum as `total`; the module's docstring has the formula.

    Args:
        shape: See `shape_of`.
        tokens: Tokens a step.
        base: "nf4", "int8" or "bf16".
        checkpointing: "full" and "offload" recompute each layer up to SwiGLU's output; the others have one floor.
        ceilings: `copy_bytes_per_s` and, for this number of tokens, `layer_gemm_ms`, `layer_gemm_recompute_ms`,
            `lm_head_ms`, `attention_ms` and `attention_forward_ms`.
    """
    layers, bandwidth = shape["layers"], ceilings["copy_bytes_per_s"]
    d, f = 2 * shape["hidden"], 2 * shape["intermediate"]
    forward, backward = 12 * d + 3 * f, 12 * d + 6 * f
    parts = {
        "gemm": layers * ceilings["layer_gemm_ms"],
        "lm_head": ceilings["lm_head_ms"],
        "attention": layers * ceilings["attention_ms"],
        "dequantization": 1e3 * layers * layer_weights(shape) * 2 * DEQUANTIZATION_BYTES[base] / bandwidth,
        "traffic": 1e3 * layers * tokens * (forward + backward) / bandwidth,
        "recomputation": 0.0,
    }
    if checkpointing in ("full", "offload"):
        a_layer = ceilings["layer_gemm_recompute_ms"] + ceilings["attention_forward_ms"]
        parts["recomputation"] = layers * (a_layer + 1e3 * tokens * forward / bandwidth)
    return {**parts, "total": sum(parts.values())}


def step_flop(shape: dict[str, int], tokens: int, seq_len: int) -> float:
    """Return the floating-point operations that a step on a frozen base needs; see `mfu` in the module's docstring."""
    linear = 4 * tokens * (shape["layers"] * layer_weights(shape) + shape["hidden"] * shape["vocab"])
    return linear + 6 * tokens * seq_len * shape["heads"] * shape["head_dim"] * shape["layers"]
