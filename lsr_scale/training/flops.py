"""Model FLOPs of training, for MFU: what the model needs at least, over what the GPU could do by its data sheet.

Per token, of a causal language model on a frozen base (as `mfu` in benchmarks/speed/throughput.py):

    4 per weight of a linear layer     forward 2, gradient of the input 2; 6 where the weight itself is trained
    the head's by the supervised share     its other rows are not computed
    6 L H D per layer     causal attention over a context of L tokens, H heads of D

Left out, so that MFU is rather too low: the adapter, padding, and everything that is recomputed.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lsr_scale import distributed
from lsr_scale.data.token_counts import evenly_spaced
from lsr_scale.fused.loss import IGNORE_INDEX

# Dense bfloat16 with float32 sums, TFLOP/s, from NVIDIA's data sheets; a name before what it begins with.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "H800": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}
_MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")  # most of whose weights a token does not meet
_ROWS_READ = 2_000


def peak_flops() -> float | None:
    """Return the FLOP/s that this process's GPU has in 16 bits by its data sheet, None where that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    if "MIG" in name:  # a slice of a GPU
        return None
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def utilization(model: Any, rows: Any) -> float | None:
    """Return the MFU of one token a second over all processes, None where its FLOPs or the GPU's peak are not known.

    Args:
        model: The model in training.
        rows: The tokenized training rows.
    """
    peak = peak_flops()
    if peak is None or next(model.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return None
    flops = flops_per_token(model, rows)
    return None if flops is None else flops / (peak * distributed.world_size())


def flops_per_token(model: Any, rows: Any) -> float | None:
    """Return the model FLOPs of a token in training, averaged over the rows, None where they are not known.

    Args:
        model: A causal language model with an adapter.
        rows: A dataset with `input_ids`, and what tells documents and supervised tokens apart.
    """
    config, head = model.config.get_text_config(), model.get_base_model().get_output_embeddings()
    if head is None or "input_ids" not in (getattr(rows, "column_names", None) or ()) or not len(rows):
        return None
    if any(getattr(config, name, None) for name in _MIXTURES) or config.is_encoder_decoder:
        return None
    context, supervised = _of_rows(rows)
    total, of_head = 0.0, set(head.modules())
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            return None
        if isinstance(module, nn.Linear) and "lora_" not in name and ".original_module" not in name:
            each = 6 if module.weight.requires_grad else 4
            share = supervised if module in of_head else 1.0
            total += each * share * module.in_features * module.out_features
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return total + 6 * context * heads * head_size * layers


def _of_rows(rows: Any) -> tuple[float, float]:
    """Return the length of the document that a token is in, averaged over the tokens, and the supervised share."""
    some = rows.select(evenly_spaced(len(rows), _ROWS_READ)).with_format(None)  # lists, whatever a trainer reads
    columns = {name: some[name][:] for name in some.column_names}
    packed = columns.get("seq_lengths")
    lengths = np.array(
        [length for row in packed for length in row] if packed else [len(ids) for ids in columns["input_ids"]], float
    )
    tokens = max(1.0, lengths.sum())
    supervised = tokens
    if "labels" in columns:
        supervised = sum((np.array(row) != IGNORE_INDEX).sum() for row in columns["labels"])
    else:
        for name in ("completion_mask", "assistant_masks"):
            if name in columns:
                supervised = sum(map(sum, columns[name]))
    return float((lengths**2).sum() / tokens), float(supervised / tokens)
