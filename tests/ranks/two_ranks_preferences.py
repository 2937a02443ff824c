"""What test_preference_ranks.py has two processes do, in one launch: three steps of DPO under each stage of ZeRO.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_preferences.py FOLDER

The folder holds `model` and rows of pairs. What each process saw goes to preferences-RANK.json, by the run's name: the
losses and norms as logged, and whether the base's matrices are sharded.
"""

import json
import sys
from pathlib import Path

from lsr_scale import cli

PAIRS = {"method": "dpo", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
STAGES = ("zero0", "zero1", "zero2", "zero3")
RUNS = {
    **{stage: ({"config": stage}, {**PAIRS, "fused": "off"}) for stage in STAGES},
    **{f"{stage}-fused": ({"config": stage}, {**PAIRS, "fused": "on"}) for stage in ("zero2", "zero3")},
}


def main() -> None:
    cli.quiet_libraries(debug=False)  # as the command does, before what reads these settings is imported
    import datasets
    from accelerate.state import AcceleratorState

    from lsr_scale import distributed
    from lsr_scale.model.shard import is_sharded
    from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer

    datasets.disable_progress_bars()
    folder, rank = Path(sys.argv[-1]), distributed.rank()
    distributed.start(use_deepspeed=True)
    seen = {}
    for name, (deepspeed, training) in RUNS.items():
        given = {"deepspeed": deepspeed, "training": training, "model": {"dtype": "float32"}}
        trainer = first_trainer(folder, "nf4", "lsr", DEFAULT, **given)
        seen[name] = {
            "logged": [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row],
            "rewards": [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row],
            "sharded": is_sharded(trainer.model),
        }
        AcceleratorState._reset_state(reset_partial_state=True)
    (folder / f"preferences-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
