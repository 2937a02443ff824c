"""What training/test_sharding.py has two processes do, in one launch: the first three steps of every combination.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_sharding.py FOLDER

The folder holds `model` and the data of `tiny_runs`, `deep`, of five layers (fused layers make the pairs of the second
to the fourth together), and `larger`, for measuring. What each process saw goes to sharding-RANK.json: the losses by
combination, and bytes.
"""

import gc
import json
import sys
import time
import weakref
from pathlib import Path

from lsr_scale import cli

STAGES = ("zero0", "zero2", "zero3", "zero3_offload")  # to the engine ZeRO-1 is ZeRO-2
BASES = ("none", "nf4", "int8")
METHODS = ("lsr", "kron_lora", "lora")
# fused, gradient_checkpointing, gradient_checkpointing_kwargs; the first is the default on a CPU
MODES = {
    "linear-checkpointed": ("off", True, None),
    "linear": ("off", False, None),
    "linear-reentrant": ("off", True, {"use_reentrant": True}),
    "fused": ("on", False, None),
    "fused-recomputed": ("on", True, None),
}
DEFAULT = "linear-checkpointed"
COMBINATIONS = [
    # every two of a stage, a base and a method meet once
    *(
        (stage, base, METHODS[(row + column) % len(METHODS)], DEFAULT)
        for row, stage in enumerate(STAGES)
        for column, base in enumerate(BASES)
    ),
    *(("zero3", "nf4", "lsr", mode) for mode in MODES if mode != DEFAULT),
    ("zero3", "int8", "lsr", "fused-recomputed"),  # of which codes and scales are gathered
]
# and whether from a checkpoint, fused then, or with random weights
MEASURED = [("nf4", True), ("int8", True), ("none", False)]
# what is unsharded at once, fused or not: of those runs, and of one beside them
GATHERED = [("nf4", True), ("nf4", False), ("int8", True), ("none", False)]
TOKENS = 2  # in a row: no size that is measured depends on it, and a CPU multiplies bfloat16 slowly


def first_losses(folder: Path, base: str, method: str, mode: str, **changes) -> tuple[list[float], object]:
    """Return the losses of a run's first three steps, and its model. A loss sees the gradients of the steps before."""
    trainer = first_trainer(folder, base, method, mode, **changes)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model


def first_trainer(folder: Path, base: str, method: str, mode: str, **changes):
    """Return the trainer of a run's first three steps."""
    from lsr_scale.run.folder import RunFolder
    from lsr_scale.training import assembly, trainers
    from tests.helpers.tiny_runs import tiny_run

    fused, checkpointing, kwargs = MODES[mode]
    training = {
        "output_dir": str(folder / "unused"),
        "max_steps": 3,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "fused": fused,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": kwargs,
        **changes.pop("training", {}),
    }
    sections = {
        "model": {"name": str(folder / ("model" if mode == DEFAULT else "deep")), "quantization": base}
        | changes.pop("model", {}),
        "adapter": {"method": method, "dropout": 0.0} | changes.pop("adapter", {}),
        # the rows of one step, seen in each
        "data": {"train": [{"path": str(folder / "rows.jsonl"), "limit": 4}]},
    }
    run = tiny_run(folder, training=training, eval={"tasks": []}, **sections, **changes)
    trainer = assembly.build_trainer(run, RunFolder(folder / "unused"))
    with trainers.ignore_library_warnings():
        trainer.train()
    return trainer


class Gathered:
    """The most bytes of gathered matrices that lived at once: all that gathers wrote and something still refers to."""

    def __init__(self) -> None:
        from lsr_scale.model import gather

        self.live: dict[int, int] = {}
        self.peak = 0
        start_all_gather = gather.start_all_gather

        def gather_and_count(shards, fulls):
            for full in fulls:
                storage = full.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
            self.peak = max(self.peak, self.lasting())
            return start_all_gather(shards, fulls)

        gather.start_all_gather = gather_and_count

    def lasting(self) -> int:
        """Return the bytes that live; gloo's threads free what they gathered when they come to run again."""
        for _ in range(1000):
            if sum(self.live.values()) <= self.peak:
                break
            time.sleep(0.002)
        return sum(self.live.values())


def main() -> None:
    cli.quiet_libraries(debug=False)  # as the command does, before what reads these settings is imported

    from benchmarks.speed.sharding import measure
    from lsr_scale import distributed
    from lsr_scale.model.shard import is_sharded

    folder, rank = Path(sys.argv[-1]), distributed.rank()
    distributed.start(use_deepspeed=True)
    seen: dict = {"losses": {}, "sharded": {}, "bytes": {}}
    for stage, base, method, mode in COMBINATIONS:
        gc.freeze()  # what the run before imported
        name = "/".join((stage, base, method, mode))
        losses, model = first_losses(folder, base, method, mode, deepspeed={"config": stage})
        seen["losses"][name], seen["sharded"][name] = losses, is_sharded(model)  # pyright: ignore
    gathered, seen["gathered"], larger = Gathered(), {}, str(folder / "larger")
    for base, checkpoint in MEASURED:
        gathered.peak = 0
        kind = "checkpoint" if checkpoint else "random"
        found = measure(larger, base, checkpoint=checkpoint, tokens=TOKENS, fused=checkpoint)
        seen["bytes"][f"{base}/{kind}"], seen["gathered"][f"{base}/{checkpoint}"] = found, gathered.peak
    gathered.peak, known = 0, seen["bytes"]["nf4/checkpoint"]
    whole = {name: known[name] for name in ("whole_bytes", "whole_load_peak_bytes")}
    measure(larger, "nf4", checkpoint=True, tokens=TOKENS, fused=False, whole=whole)
    seen["gathered"]["nf4/False"] = gathered.peak
    (folder / f"sharding-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
