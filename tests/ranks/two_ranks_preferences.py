"""What test_preference_ranks.py has two processes do, in one launch: three steps of DPO under each stage of ZeRO.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_preferences.py FOLDER

The folder holds `model` and rows of pairs. What each process saw goes to preferences-RANK.json, by the run's name: the
losses and norms as logged, and whether the base's matrices are sharded.
"""

import json

from tests.ranks.run_after_run import logged, result_file, trainers

PAIRS = {"method": "dpo", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
STAGES = ("zero0", "zero2", "zero3")  # to the engine ZeRO-1 is ZeRO-2
RUNS = {
    **{stage: {"deepspeed": {"config": stage}, "training": {**PAIRS, "fused": "off"}} for stage in STAGES},
    **{
        f"{stage}-fused": {"deepspeed": {"config": stage}, "training": {**PAIRS, "fused": "on"}}
        for stage in ("zero2", "zero3")
    },
}


def main() -> None:
    from lsr_scale.model.shard import is_sharded

    seen = {}
    for name, trainer in trainers(RUNS):
        seen[name] = {
            "logged": logged(trainer),
            "rewards": [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row],
            "sharded": is_sharded(trainer.model),
        }
    result_file("preferences-{}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
