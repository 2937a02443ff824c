"""What a trained adapter still knows when its factors are rounded to 8 or 4 bits: scored again on its run's tasks.

Rounded as `lsr-scale export --to adapter --bits` does it (`lsr_scale.adapters.packing`), for adapters of any method.
Used by `commonsense.py`, after a seed's run, while the data and the kernels are at hand.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lsr_scale.adapters.packing import pack, unpack
from lsr_scale.run import evaluate
from lsr_scale.run.load import load_run_model


def rounded(factors: dict[str, torch.Tensor], bits: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return an adapter's factors after rounding, and the bytes of codes and scales.

    Args:
        factors: By the names that PEFT saves them under, all of linears called `..._proj`.
        bits: 8 or 4.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, factor in factors.items():
        # the prefix is `unpack`'s
        parts = re.fullmatch(r"base_model\.model\.(.*_proj)\.(.*)", name)
        if parts is None:
            raise ValueError(f"{name}: expected a factor of a linear whose name ends in _proj")
        modules.setdefault(parts[1], {})[parts[2]] = factor.cpu()
    packed = pack(modules, bits)
    size = sum(value.numel() * value.element_size() for value in packed.values())
    return unpack(packed), size


def score_rounded(folder: str | Path, bits: tuple[int, ...] = (8, 4)) -> dict[str, Any]:
    """Return, for each number of bits, `bytes` and each task's accuracy and which examples were right.

    Args:
        folder: Of a finished run.
        bits: Of the factors.
    """
    model, tokenizer, run = load_run_model(folder)
    tasks = evaluate.load_tasks(run.eval)
    exact = {name: factor.clone() for name, factor in get_peft_model_state_dict(model).items()}
    scores_by_bits: dict[str, Any] = {}
    for number in bits:
        factors, size = rounded(exact, number)
        loaded = set_peft_model_state_dict(model, factors)
        if loaded.unexpected_keys or factors.keys() != exact.keys():
            raise ValueError(f"{folder}: rounded factors do not fit: {loaded.unexpected_keys[:3]}")
        scores = evaluate.score_tasks(
            tasks, model, tokenizer, print, f"rounded to {number} bits", run.eval.batch_tokens
        )
        right = {
            name: "".join(str(int(p.choice == p.answer)) for p in score.predictions) for name, score in scores.items()
        }
        scores_by_bits[str(number)] = {
            "bytes": size,
            "tasks": {name: {"accuracy": word.count("1") / len(word), "right": word} for name, word in right.items()},
        }
    return scores_by_bits
