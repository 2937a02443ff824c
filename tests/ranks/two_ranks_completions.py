"""What test_grpo_ranks.py has two processes do, in one launch: three steps of GRPO without DeepSpeed, then with it.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_completions.py FOLDER

The folder holds `model` and rows of prompts. What each process saw goes to completions-RANK.pt, by the run's name: its
factors at the end, and what was logged.
"""

import sys
from pathlib import Path

import torch

from lsr_scale import cli

# without DeepSpeed first, as in two_ranks_watching: what its engine leaves in a process changes such a run
RUNS = {
    "plain": ({"config": None}, "off"),
    "zero0": ({"config": "zero0"}, "off"),
    "zero1": ({"config": "zero1"}, "off"),
    "zero2": ({"config": "zero2"}, "off"),
    "zero2-fused": ({"config": "zero2"}, "on"),
}
TRAINING = {
    "method": "grpo",
    # several, so that hardly any four completions are worth the same
    "reward": [{"name": "regex", "pattern": one} for one in ("[a-z]", "[A-Z]", "[0-9]")],
    "learning_rate": 2e-2,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_prompt_length": 24,
    "beta": 0.1,
}
LOGGED = ("loss", "reward", "kl", "grad_norm")


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
    for name, (deepspeed, fused) in RUNS.items():
        training = {**TRAINING, "fused": fused}
        given = {"deepspeed": deepspeed, "training": training, "model": {"dtype": "float32"}}
        trainer = first_trainer(folder, "nf4", "lsr", DEFAULT, **given)
        parameters = trainer.model.named_parameters()
        seen[name] = {
            "factors": {key: value.detach().clone() for key, value in parameters if value.requires_grad},
            "logged": [[row[key] for key in LOGGED] for row in trainer.state.log_history if "reward" in row],
            "prompts": sorted(set(trainer._logs["prompt"])),
        }
        AcceleratorState._reset_state(reset_partial_state=True)
    torch.save(seen, folder / f"completions-{rank}.pt")


if __name__ == "__main__":
    main()
