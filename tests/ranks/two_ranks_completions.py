"""What test_grpo_ranks.py has two processes do, in one launch: three steps of GRPO without DeepSpeed, then with it.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_completions.py FOLDER

The folder holds `model` and rows of prompts. What each process saw goes to completions-RANK.pt, by the run's name: its
factors at the end, what was logged, whether its base was sharded and what generated.
"""

import torch

from lsr_scale.model.shard import is_sharded
from tests.ranks.run_after_run import result_file, trainers

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
BY_TRL = {"generation_kwargs": {"length_penalty": 1.0}}  # which changes nothing, but the decoder has none
RUNS = {
    name: {"deepspeed": {"config": config}, "training": {**TRAINING, "fused": fused, **changes}}
    for name, config, fused, changes in (
        ("plain", None, "off", {}),
        ("zero0", "zero0", "off", {}),
        ("zero2", "zero2", "off", {}),  # to the engine ZeRO-1 is this
        ("zero2-fused", "zero2", "on", {}),
        ("zero3", "zero3", "off", {}),
        ("zero3-trl", "zero3", "off", BY_TRL),
        ("zero3-fused", "zero3_offload", "on", {}),
    )
}


def main() -> None:
    seen = {}
    for name, trainer in trainers(RUNS):
        parameters = trainer.model.named_parameters()
        seen[name] = {
            "factors": {key: value.detach().clone() for key, value in parameters if value.requires_grad},
            "logged": [[row[key] for key in LOGGED] for row in trainer.state.log_history if "reward" in row],
            "sharded": is_sharded(trainer.model),
            "generated": trainer._generation_said,
            "prompts": sorted(set(trainer._logs["prompt"])),
        }
    torch.save(seen, result_file("completions-{}.pt"))


if __name__ == "__main__":
    main()
