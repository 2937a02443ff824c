"""What test_two_ranks.py has two processes do, in one start: run after run, each under another engine.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks.py FOLDER

The folder holds a model and the data of `tiny_runs`; what was seen goes to seen-RANK.json in it.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from lsr_scale import cli

QUICK = {"training": {"save_strategy": "no"}, "eval": {"tasks": []}}
# engines whose optimizers differ, and a sharded base; to the engine ZeRO-2 is ZeRO-1
EIGHT_BIT = ("zero2", "zero3")
STOPPED = ("zero0", "zero2", "zero3")
FUSED = {"training": {"save_strategy": "no", "fused": "on"}, "eval": {"tasks": []}}
FP8, INT8 = (
    {"training": {"save_strategy": "no", "fused": "on", "compute": compute}, "eval": {"tasks": []}}
    for compute in ("fp8", "int8")
)
ENGINES = {
    "ddp": {"deepspeed": {"config": None}, **QUICK},
    "ddp-fused": {"deepspeed": {"config": None}, **FUSED},
    "ddp-fp8": {"deepspeed": {"config": None}, **FP8},
    "zero0": {"deepspeed": {"config": "zero0"}, **QUICK},
    "zero1": {"deepspeed": {"config": "zero1"}, **QUICK},
    "zero2": {"deepspeed": {"config": "zero2"}},
    "zero2-fused": {"deepspeed": {"config": "zero2"}, **FUSED},
    **{f"{name}-fp8": {"deepspeed": {"config": name}, **FP8} for name in EIGHT_BIT},
    **{f"{name}-int8": {"deepspeed": {"config": name}, **INT8} for name in EIGHT_BIT},
    "zero3": {"deepspeed": {"config": "zero3"}, "eval": {"batch_tokens": 32}, "training": {"save_as_lora": True}},
    "zero3-fused": {"deepspeed": {"config": "zero3"}, "training": {"save_strategy": "no", "fused": "on"}},
    "zero3-bfloat16": {"deepspeed": {"config": "zero3"}, "model": {"quantization": "none"}},
}
SAVING = {name: {"deepspeed": {"config": name}, "eval": {"tasks": []}} for name in ("zero0", "zero1", "zero2", "zero3")}


class Killed(BaseException):
    """Ends a run as a kill would, as far as files go."""


class Watch(TrainerCallback):
    """Notes which engine trains, and the dtypes of what it trains; stops the run after a step, if wanted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.seen: dict = {}

    def on_step_begin(self, args, state, control, **kwargs):
        model = kwargs["model"]
        trained = {str(p.dtype) for p in model.parameters() if p.requires_grad}
        self.seen |= {
            "trained": sorted(trained),
            "stage": getattr(self.trainer.model_wrapped, "zero_optimization_stage", list)(),
        }
        self.seen["engine"] = type(self.trainer.model_wrapped).__name__

    def on_step_end(self, args, state, control, **kwargs):
        self.seen["modes"] = sorted({module.training for module in kwargs["model"].modules()})
        if state.global_step - 1 == self.stop_after:
            raise Killed


def main() -> None:
    cli.quiet_libraries(debug=False)

    from lsr_scale import adapters, distributed
    from lsr_scale.config import dump_yaml
    from lsr_scale.run import train
    from lsr_scale.training import assembly
    from tests.helpers.fp8 import pretend_fp8
    from tests.helpers.tiny_runs import tiny_run

    pretend_fp8(pytest.MonkeyPatch())
    folder, rank = Path(sys.argv[-1]), distributed.rank()
    seen: dict[str, dict] = {}
    forward: set[str] = set()
    materialize = adapters.METHODS["lsr"].materialize

    def spy(params):
        forward.update(str(p.dtype) for p in params.values())
        return materialize(params)

    adapters.METHODS["lsr"].materialize = staticmethod(spy)
    build, watch = assembly.build_trainer, Watch()

    def build_and_watch(run, where, callbacks, *rest):
        watch.trainer = build(run, where, [*callbacks, watch], *rest)
        return watch.trainer

    train.build_trainer = build_and_watch
    train.show_at_end = lambda folder: "report: left out"  # nobody looks at it
    distributed.stop = lambda: None  # the processes stay together for the next run

    def do(name: str, *options: str, stop_after: int | None = None, **sections) -> None:
        nonlocal watch
        watch = Watch(stop_after)
        forward.clear()
        gc.freeze()  # also of what the run before imported
        training = {"output_dir": str(folder / name), "fused": "off", **sections.pop("training", {})}
        file = folder / f"{name}-{rank}.yaml"
        file.write_text(dump_yaml(tiny_run(folder, training=training, **sections)))
        try:
            # the launcher's own flag comes first
            status = cli.main(["train", f"--local_rank={rank}", "--config", str(file), *options])
            seen[name] = {**watch.seen, "status": status, "forward": sorted(forward)}
        except Killed:
            seen[name] = {**watch.seen, "status": "killed"}

    for name, sections in ENGINES.items():
        do(name, **sections)
    still = {"training": {"save_strategy": "no", "learning_rate": 0.0, "max_steps": 1}, "eval": {"tasks": []}}
    for name in ("zero1", "zero3"):
        start = {"adapter": {"start_from": str(folder / "zero2")}}
        do(f"{name}-started", deepspeed={"config": name}, **start, **still)
    # 16 rows are four steps of two on each rank: checkpoints after 2 and 4, the stop in the third
    for name in STOPPED:
        do(f"{name}-stopped", stop_after=2, **SAVING[name])
        if rank == 0:
            shutil.copytree(folder / f"{name}-stopped", folder / f"{name}-halved")
            if name == "zero2":
                shutil.copytree(folder / f"{name}-stopped", folder / "there-and-back")
        do(f"{name}-stopped", "--resume", "auto", **SAVING[name])
    # seven steps, saved after the third and the sixth, which is the second epoch's second
    training = {"num_train_epochs": 2, "max_steps": 7, "save_steps": 3, "per_device_train_batch_size": 2}
    epochs = {"deepspeed": {"config": "zero2"}, "eval": {"tasks": []}, "adapter": {"dropout": 0.2}}
    do("epochs", training=training, **epochs)
    do("epochs-stopped", stop_after=6, training=training, **epochs)
    do("epochs-stopped", "--resume", "auto", training=training, **epochs)
    for before, after in (("zero3", "zero2"), ("zero2", "zero3")):
        name = f"{before}-to-{after}"
        if rank == 0:
            shutil.copytree(folder / f"{before}-halved", folder / name)
        distributed.broadcast(None)
        do(name, "--resume", "auto", **SAVING[after])
    talk = {"model": {"name": str(folder / "talking"), "quantization": "none"}}
    talk["data"] = {"train": [str(folder / "talk.jsonl")], "validation": [str(folder / "talk.jsonl")]}
    do("talk", training={"per_device_train_batch_size": 1}, eval={"tasks": []}, deepspeed={"config": "zero2"}, **talk)
    for after in ("zero1", "zero3"):
        do(f"one-to-{after}", "--resume", "auto", **SAVING[after])
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
