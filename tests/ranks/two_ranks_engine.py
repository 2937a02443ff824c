"""What test_engine.py has two processes do, in one launch: the first three steps under each stage of ZeRO.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_engine.py FOLDER

The folder holds `model` and the data of `tiny_runs`. What each process saw goes to engine-RANK.json, by stage and rows
of a micro-batch: the losses and norms as logged, the optimizer's class, and the hooks on what trains.
"""

import json

from tests.ranks.run_after_run import logged, result_file, trainers

# steps along the gradient, far shorter than it is: these losses see its length
CLIPPED = {"optim": "sgd", "max_grad_norm": 0.1, "learning_rate": 1.0}
STAGES = ("zero0", "zero1", "zero2", "zero3")
# and rows in a micro-batch, of two
RUNS = {
    f"{stage}/{rows}": {
        "deepspeed": {"config": stage},
        "training": {**CLIPPED, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 2 // rows},
    }
    for stage in STAGES
    for rows in (1, 2)
    if (stage, rows) not in (("zero1", 1), ("zero2", 2))  # to the engine ZeRO-2 is ZeRO-1
}


def main() -> None:
    seen = {}
    for name, trainer in trainers(RUNS, "none"):
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        seen[name] = {
            "logged": logged(trainer),
            "optimizer": type(trainer.deepspeed.optimizer).__name__,
            "hooks": sum(len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in trained),
        }
    result_file("engine-{}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
