"""Low-rank pairs as LoRA adapters: truncated by an SVD of their small core, and the `LoraConfig` that they load by."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best pair of a smaller rank, and the relative error (Frobenius) of its product.

    QR of both thin matrices, then the SVD of the small core: `up down = Q_u (R_u R_d^T) Q_d^T`. Exact where `rank` is
    at least that of the product; the singular values' square roots go to both sides.

    Args:
        down: `[R, in]`.
        up: `[out, R]`.
        rank: Of the result; at most in and out, which no product's rank is above.

    Returns:
        down `[rank, in]` and up `[out, rank]` in the dtype of the arguments, computed in float64, and the error.
    """
    if rank >= down.shape[0]:
        return down, up, 0.0
    up_q, up_r = torch.linalg.qr(up.double())
    down_q, down_r = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(up_r @ down_r.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_down, new_up = root[:, None] * right[:rank] @ down_q.T, up_q @ left[:, :rank] * root
    error = float(values[rank:].norm() / values.norm()) if values[0] > 0 else 0.0
    return new_down.to(down.dtype), new_up.to(up.dtype), error


def lora_config(ranks: Mapping[str, int], like: PeftConfig, **targets: Any) -> LoraConfig:
    """Return the configuration of a LoRA adapter whose scaling is 1 at every module: it is folded into lora_B.

    Args:
        ranks: By the modules' names.
        like: The configuration that task, base and modules_to_save are taken from.
        targets: `target_modules`, and other options that select modules.
    """
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type=like.task_type,
        inference_mode=True,
        modules_to_save=getattr(like, "modules_to_save", None),
        base_model_name_or_path=like.base_model_name_or_path,
        **targets,
    )
