"""What test_watching.py has two processes do, in one launch: runs with prompts and early stopping under each engine.

torchrun --nproc_per_node 2 tests/ranks/two_ranks_watching.py FOLDER
"""

import gc
import sys
from pathlib import Path

from lsr_scale import cli

# to the engine ZeRO-1 is ZeRO-2
ENGINES = {"ddp": None, "zero0": "zero0", "zero2": "zero2", "zero3": "zero3"}


def main() -> None:
    cli.quiet_libraries(debug=False)
    from lsr_scale import distributed
    from lsr_scale.config import dump_yaml
    from lsr_scale.run import train
    from tests.helpers.tiny_runs import tiny_run

    folder, rank = Path(sys.argv[-1]), distributed.rank()
    train.show_at_end = lambda folder: "report: left out"  # nobody looks at it
    distributed.stop = lambda: None  # the processes stay together for the next run

    def do(name: str, engine: str | None, prompts: list[str], **training) -> None:
        values = {"output_dir": str(folder / name), "num_train_epochs": 2, "save_steps": 1, "learning_rate": 0.2}
        stopping = {"early_stopping": {"patience": 1}, "fused": "off", "report_to": "tensorboard"}
        run = tiny_run(
            folder,
            data={"validation": [str(folder / "held.jsonl")]},
            training={**values, **stopping, **training},
            eval={"tasks": [], "prompts": prompts, "max_new_tokens": 5},
            deepspeed={"config": engine},
        )
        gc.freeze()  # what the run before imported
        file = folder / f"{name}-{rank}.yaml"
        file.write_text(dump_yaml(run))
        assert cli.main(["train", f"--local_rank={rank}", "--config", str(file)]) == 0

    prompts = ["a knife", "a broom sweeps floors", "a"]
    for name, engine in ENGINES.items():
        do(name, engine, prompts)
    do("zero3-fused", "zero3", prompts, fused="on")
    do("zero3-without", "zero3", [])


if __name__ == "__main__":
    main()
