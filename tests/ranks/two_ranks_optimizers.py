"""What test_optimizer_ranks.py has two processes do, in one launch: three steps from the gradient's start.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_optimizers.py FOLDER

The folder holds `model` and rows. What each process saw goes to optimizers-RANK.json, by the run's name: the losses and
norms as logged, and the sum of the factors' squares at the end.
"""

import json
import sys
from pathlib import Path

from lsr_scale import cli

# without DeepSpeed first, as in two_ranks_watching: what its engine leaves in a process changes such a run
RUNS = {
    "lora_pro": ({"config": None}, {"optim": "lora_pro", "learning_rate": 1e-4}),
    "lora_rite": ({"config": "zero0"}, {"optim": "lora_rite"}),
    "adamw": ({"config": "zero2"}, {"optim": "adamw_torch_fused"}),
}
START = {"init": "gradient", "init_rows": 3}


def main() -> None:
    cli.quiet_libraries(debug=False)  # as the command does, before what reads these settings is imported
    import datasets
    from accelerate.state import AcceleratorState

    from lsr_scale import distributed
    from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer

    datasets.disable_progress_bars()
    folder, rank = Path(sys.argv[-1]), distributed.rank()
    distributed.start(use_deepspeed=True)
    seen = {}
    for name, (deepspeed, training) in RUNS.items():
        training = {**training, "per_device_train_batch_size": 1}
        given = {"deepspeed": deepspeed, "training": training, "model": {"dtype": "float32"}, "adapter": START}
        seen[name] = summary(first_trainer(folder, "nf4", "lsr", DEFAULT, **given))
        AcceleratorState._reset_state(reset_partial_state=True)
    (folder / f"optimizers-{rank}.json").write_text(json.dumps(seen))


def summary(trainer) -> dict[str, object]:
    """Return what is compared of a run."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "logged": [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row],
        "squares": float(sum(parameter.detach().double().square().sum() for parameter in trained)),
    }


if __name__ == "__main__":
    main()
