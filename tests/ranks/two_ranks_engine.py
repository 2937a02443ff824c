"""What test_engine.py has two processes do, in one launch: the first three steps under each stage of ZeRO.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_engine.py FOLDER

The folder holds `model` and the data of `tiny_runs`. What each process saw goes to engine-RANK.json, by stage and rows
of a micro-batch: the losses and norms as logged, the optimizer's class, and the hooks on what trains.
"""

import json
import sys
from pathlib import Path

from lsr_scale import cli

# steps along the gradient, far shorter than it is: these losses see its length
CLIPPED = {"optim": "sgd", "max_grad_norm": 0.1, "learning_rate": 1.0}
EXACT = {"dtype": "float32"}  # the model's, for these
STAGES = ("zero0", "zero1", "zero2", "zero3")
# and rows in a micro-batch, of two
RUNS = [(stage, rows) for stage in STAGES for rows in (1, 2)]


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
    for stage, rows in RUNS:
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2 // rows}
        given = {"deepspeed": {"config": stage}, "training": {**CLIPPED, **batches}, "model": EXACT}
        trainer = first_trainer(folder, "none", "lsr", DEFAULT, **given)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        seen[f"{stage}/{rows}"] = {
            "logged": [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row],
            "optimizer": type(trainer.deepspeed.optimizer).__name__,
            "hooks": sum(len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in trained),
        }
        AcceleratorState._reset_state(reset_partial_state=True)
    (folder / f"engine-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
