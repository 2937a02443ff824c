"""What a training step costs at least: shapes of models, operations, and the floor of its time.

**The floor** is the time that a step with a frozen base and free adapters would take at ceilings measured in the same
run (`floor_ms`): grouped GEMMs (qkv, o, gate+up, down; forward and dX), lm_head's GEMMs, cuDNN attention, and, at the
bandwidth of a device copy, the bytes of two dequantizations of every linear layer and of norms, RoPE and SwiGLU (per
token and layer 12 D + 3 F forward and 12 D + 6 F backward, where D = 2 hidden and F = 2 intermediate bytes). With
checkpointing each layer is recomputed up to SwiGLU's output: all forward GEMMs but down's, forward attention, and
the forward traffic.

**In FP8** the layers' GEMMs are FP8 ones. Each dequantization writes a byte a weight instead of two; a bf16 base has
them too. What a kernel writes for a GEMM alone is a byte a value: both norms' and SwiGLU's outputs forward, and
SwiGLU's and RoPE's gradients backward; beside the norms' input gradients, which the residual needs in bf16, stand their
codes. That is 11 D + 2.5 F forward and 12 D + 5 F backward. A layer that is recomputed needs its weights in both
orientations at once, so those of qkv, o and gate+up are written once more. Scales and the quantization of attention's
output count nothing: attention could write codes itself.

**In int8** the floor is that in FP8: as many bytes, and tensor cores multiply int8 as fast as e4m3, so FP8's products
are the ceiling of both directions. Rotations count nothing: they belong to kernels whose bound is memory.
"""

from typing import Any

# dense bf16, TFLOP/s, from the data sheets
NOMINAL_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0}
# bytes read and written per weight by one dequantization to bf16; NF4 with double quantization has a byte of scale per
# 64 weights and a float32 per 256 of those
DEQUANTIZATION_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64 + 2, "int8": 1 + 2, "bf16": 0.0}
# and by one to 8 bits
DEQUANTIZATION_BYTES_FP8 = {"nf4": 0.5 + (1 + 4 / 256) / 64 + 1, "int8": 1 + 1, "bf16": 2 + 1}
STORED_BYTES = {"nf4": 0.516, "int8": 1.0, "bf16": 2.0}


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
    shape: dict[str, int],
    tokens: int,
    base: str,
    checkpointing: str,
    ceilings: dict[str, Any],
    compute: str = "bf16",
) -> dict[str, float]:
    """Return the parts of a step's floor in ms, and their sum as `total`; the module's docstring has the formula.

    Args:
        shape: See `shape_of`.
        tokens: Tokens a step.
        base: "nf4", "int8" or "bf16".
        checkpointing: "full" and "offload" recompute each layer up to SwiGLU's output; the others have one floor.
        ceilings: `copy_bytes_per_s` and, for this number of tokens, `layer_gemm_ms`, `layer_gemm_recompute_ms`,
            `lm_head_ms`, `attention_ms` and `attention_forward_ms`; for FP8 and int8
            `layer_gemm_fp8_ms` and `layer_gemm_recompute_fp8_ms`.
        compute: What the base's products are computed in, "bf16", "fp8" or "int8".
    """
    layers, bandwidth = shape["layers"], ceilings["copy_bytes_per_s"]
    d, f = 2 * shape["hidden"], 2 * shape["intermediate"]
    eight_bit = compute != "bf16"
    forward, backward = (11 * d + 2.5 * f, 12 * d + 5 * f) if eight_bit else (12 * d + 3 * f, 12 * d + 6 * f)
    gemm, again = (f"layer_gemm{part}{'_fp8' if eight_bit else ''}_ms" for part in ("", "_recompute"))
    a_weight = (DEQUANTIZATION_BYTES_FP8 if eight_bit else DEQUANTIZATION_BYTES)[base]
    parts = {
        "gemm": layers * ceilings[gemm],
        "lm_head": ceilings["lm_head_ms"],
        "attention": layers * ceilings["attention_ms"],
        "dequantization": 1e3 * layers * layer_weights(shape) * 2 * a_weight / bandwidth,
        "traffic": 1e3 * layers * tokens * (forward + backward) / bandwidth,
        "recomputation": 0.0,
    }
    if checkpointing in ("full", "offload"):
        down = shape["hidden"] * shape["intermediate"]
        transposed = layer_weights(shape) - down if eight_bit else 0
        a_layer = ceilings[again] + ceilings["attention_forward_ms"]
        parts["recomputation"] = layers * (a_layer + 1e3 * (tokens * forward + transposed) / bandwidth)
    return {**parts, "total": sum(parts.values())}


def step_flop(shape: dict[str, int], tokens: int, seq_len: int) -> float:
    """Return the floating-point operations that a step on a frozen base needs; see `mfu` in the module's docstring."""
    linear = 4 * tokens * (shape["layers"] * layer_weights(shape) + shape["hidden"] * shape["vocab"])
    return linear + 6 * tokens * seq_len * shape["heads"] * shape["head_dim"] * shape["layers"]
