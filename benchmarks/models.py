"""The models that benchmarks run on, by the names of their options, and the linears that are adapted in them."""

import json
from typing import Any

from benchmarks import ROOT

SMOLLM2 = "builtin:smollm2-135m-instruct"
# of a decoder layer
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# only shapes: the weights are random
MODELS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
TINY = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512},
}


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
