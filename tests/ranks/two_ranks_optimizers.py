"""What test_optimizer_ranks.py has two processes do, in one launch: three steps from the gradient's start.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_optimizers.py FOLDER

The folder holds `model` and rows. What each process saw goes to optimizers-RANK.json, by the run's name: the losses and
norms as logged, and the sums of squares of what a checkpoint would have at the end, the factors' and the optimizer's.
"""

import json
from typing import Any

import torch

from tests.ranks.run_after_run import logged, result_file, trainers

LORA_PRO = {"optim": "lora_pro", "learning_rate": 1e-4}
START = {"init": "gradient", "init_rows": 3}
LORA = {**START, "method": "lora", "rank": 4}
NORMS = {**START, "modules_to_save": ["norm"]}  # which AdamW does not decay: a group of their own
RUNS: dict[str, dict[str, Any]] = {
    name: {
        "deepspeed": {"config": config},
        "adapter": adapter,
        "training": {**training, "per_device_train_batch_size": 1},
    }
    for name, config, adapter, training in (
        ("lora_pro", None, START, LORA_PRO),
        ("lora_rite", "zero0", START, {"optim": "lora_rite"}),
        ("adamw", "zero2", START, {"optim": "adamw_torch_fused"}),
        ("adamw-norms", "zero2", NORMS, {"optim": "adamw_torch_fused", "weight_decay": 0.01}),
        *((f"lora_plus-{zero}", zero, LORA, {"optim": "lora_plus"}) for zero in ("zero0", "zero1")),
        ("lora_pro-after-deepspeed", None, START, LORA_PRO),
    )
}


def main() -> None:
    seen = {name: summary(trainer) for name, trainer in trainers(RUNS)}
    result_file("optimizers-{}.json").write_text(json.dumps(seen))


def summary(trainer) -> dict[str, Any]:
    """Return what is compared of a run, whose parameters and state are taken out and put in again before."""
    from lsr_scale.training.checkpoint import trained_state

    taken = trained_state.collect(trainer)
    trained_state.restore(trainer, *taken)
    again = trained_state.collect(trainer)
    assert taken[1] == again[1]
    assert all(torch.equal(value, again[0][name]) for name, value in taken[0].items())
    squares: dict[str, float] = {}
    for name, value in taken[0].items():
        kind = name.partition("/")[0]
        squares[kind] = squares.get(kind, 0.0) + float(value.double().square().sum())
    return {"logged": logged(trainer), "squares": squares}


if __name__ == "__main__":
    main()
