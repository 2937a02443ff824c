"""What test_optimizer_ranks.py has two processes do, in one launch: three steps from the gradient's start.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_optimizers.py FOLDER

The folder holds `model` and rows. What each process saw goes to optimizers-RANK.json, by the run's name: the losses and
norms as logged, and the sum of the factors' squares at the end.
"""

import json

from tests.ranks.run_after_run import logged, result_file, trainers

LORA_PRO = {"optim": "lora_pro", "learning_rate": 1e-4}
START = {"init": "gradient", "init_rows": 3}
RUNS = {
    name: {
        "deepspeed": {"config": config},
        "adapter": START,
        "training": {**training, "per_device_train_batch_size": 1},
    }
    for name, config, training in (
        ("lora_pro", None, LORA_PRO),
        ("lora_rite", "zero0", {"optim": "lora_rite"}),
        ("adamw", "zero2", {"optim": "adamw_torch_fused"}),
        ("lora_pro-after-deepspeed", None, LORA_PRO),
    )
}


def main() -> None:
    seen = {name: summary(trainer) for name, trainer in trainers(RUNS)}
    result_file("optimizers-{}.json").write_text(json.dumps(seen))


def summary(trainer) -> dict[str, object]:
    """Return what is compared of a run."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    squares = sum(parameter.detach().double().square().sum() for parameter in trained)
    return {"logged": logged(trainer), "squares": float(squares)}


if __name__ == "__main__":
    main()
