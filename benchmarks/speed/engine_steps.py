"""What does a step under DeepSpeed cost the host: as it is patched here, by its own settings, and by plain PyTorch?

    torchrun --nproc_per_node 2 -m benchmarks.speed.engine_steps --out benchmarks/results/engine_steps/NAME.json
    torchrun --nproc_per_node 2 -m benchmarks.speed.engine_steps --device cpu --model tiny --layers 16 --base none \\
        --points 64x32 --steps 10 --rounds 3 --out benchmarks/results/engine_steps/NAME.json

`deepspeed --num_gpus 2 --module benchmarks.speed.engine_steps ...` starts it as well. `ALTERNATIVES` train on the same
rows with the same trainer, in turns; they differ in who averages, clips and shards alone. A row is an alternative at a
point, tokens a step and process x length of a sequence:

- `ms`: a step, the median over rounds of `--steps` steps each, GPUs synchronized around them; `tokens_per_s` of all.
- `cpu_ms`: a process's CPU time a step, all threads: the host's work, also where a busy machine makes `ms` longer.
- `ratio`, `cpu_ratio`: `ms` and `cpu_ms` of "patched_zero1" over this one's, medians over rounds of what the same round
  has. Above 1 is faster.
- `operators`, `collectives`, `launches`: of one step, forward and backward included, as torch's profiler counts them.
- `python_calls`: of one step, in the main thread. `hooks`: Python's on `parameters` that train; DDP has its own in C++.
- `losses` and `norms` as logged, every third step: the same for all that clip, up to the order of sums.

At a point of few tokens (64x32) a GPU waits for its host, so `ms` is the host's time.
"""

import argparse
import contextlib
import datetime
import gc
import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import TrainerCallback

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.trainer_overhead import run_of, write_model, write_rows
from benchmarks.speed.workers import say

# steps before those that are timed, and after: one for torch's profiler, one for Python's calls
WARM_UP, COUNTED = 3, 2


@dataclass(frozen=True)
class Alternative:
    """Who does what in a step.

    Attributes:
        zero: DeepSpeed's `zero_optimization`; None trains without its engine, by DistributedDataParallel.
        patched: The engine is patched by `lsr_scale.training.steps.engine`.
        stock: Nothing else is changed either: `train`, `zero_grad` and clipping walk over all modules in every step.
        one_bucket: DistributedDataParallel has all gradients in one bucket, of which they are views.
        flat: The engine reduces nothing; an optimizer's pre-hook averages and clips one vector of all gradients.
        zero_redundancy: PyTorch's ZeroRedundancyOptimizer shards the optimizer's state.
        clips: Gradients are clipped, as a run asks for.
    """

    zero: dict[str, Any] | None
    patched: bool = False
    stock: bool = False
    one_bucket: bool = False
    flat: bool = False
    zero_redundancy: bool = False
    clips: bool = True


# DeepSpeed's own settings that make it do least for each parameter
_FEWEST = {"overlap_comm": False, "contiguous_gradients": False, "reduce_bucket_size": 2**30}
ALTERNATIVES = {
    "patched_zero1": Alternative({"stage": 1}, patched=True),  # ZeRO-2 and 3 are the same for what trains
    "patched_zero0": Alternative({"stage": 0}, patched=True),
    "deepspeed_zero0": Alternative({"stage": 0}, stock=True),
    "deepspeed_zero1": Alternative({"stage": 1, "reduce_bucket_size": "auto"}, stock=True),
    "deepspeed_zero2": Alternative({"stage": 2, "reduce_bucket_size": "auto"}, stock=True),
    "deepspeed_zero1_settings": Alternative({"stage": 1, **_FEWEST, "reduce_scatter": False}),
    "deepspeed_zero2_settings": Alternative({"stage": 2, **_FEWEST, "round_robin_gradients": True}),
    "deepspeed_zero1_unclipped": Alternative(
        {"stage": 1, **_FEWEST, "reduce_scatter": False, "compute_grad_norm": False}, clips=False
    ),
    "ddp": Alternative(None, stock=True),
    "ddp_one_bucket": Alternative(None, one_bucket=True),
    "ddp_zero_redundancy": Alternative(None, one_bucket=True, zero_redundancy=True),
    "flat_zero_redundancy": Alternative({"stage": 0}, flat=True, zero_redundancy=True),
}


class Meter(TrainerCallback):
    """Times a run's steps, and counts what one of them does.

    Attributes:
        ms, cpu_ms: Of a timed step.
        counts: Of a step after those.
    """

    def __init__(self, steps: int, device: str) -> None:
        self.first, self.last = WARM_UP, WARM_UP + steps
        self.device = device
        self.ms = self.cpu_ms = 0.0
        self.counts: dict[str, int] = {}
        self._began = (0.0, 0.0)
        self._profiler: Any = None
        self._calls = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to time or to count."""
        step = state.global_step
        if step == self.first:
            self._began = self._now()
        elif step == self.last:
            self.ms, self.cpu_ms = (
                1e3 * (now - began) / (self.last - self.first)
                for now, began in zip(self._now(), self._began, strict=True)
            )
            kinds = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(
                activities=[kinds.CPU, kinds.CUDA] if self.device == "cuda" else [kinds.CPU]
            )
            self._profiler.__enter__()
        elif step == self.last + 1:
            sys.setprofile(self._count)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; the step is among those done by now."""
        sys.setprofile(None)
        if state.global_step == self.last + 1:
            self._profiler.__exit__(None, None, None)
            events = [(event.key, event.count) for event in self._profiler.key_averages()]
            for name, prefix in (("operators", "aten::"), ("collectives", "c10d::"), ("launches", "cudaLaunch")):
                self.counts[name] = sum(count for key, count in events if key.startswith(prefix))
        elif state.global_step == self.last + 2:
            trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
            hooks = [len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in trained]
            self.counts |= {"python_calls": self._calls, "hooks": sum(hooks), "parameters": len(trained)}

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += event == "call"

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        return time.perf_counter(), time.process_time()


def zero_redundancy(optimizer: torch.optim.Optimizer) -> ZeroRedundancyOptimizer:
    """Return PyTorch's sharded optimizer in place of a trainer's: each process updates its share of the parameters."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    filled = [group for group in optimizer.param_groups if group["params"]]
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in filled]
    return ZeroRedundancyOptimizer(groups, kind, parameters_as_bucket_view=True, **settings)


def trained_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that train."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def without_walks(trainer: Any) -> None:
    """Spare a trainer the walks over all modules that engines and DistributedDataParallel make in every step."""
    wrapped, module = trainer.model_wrapped, trainer.model
    trained = trained_of(module.train())
    wrapped.train = lambda mode=True: module.training == mode or module.train(mode)
    wrapped.zero_grad = lambda *_, **__: [setattr(parameter, "grad", None) for parameter in trained]
    trainer.accelerator.clip_grad_norm_ = lambda parameters, max_norm: torch.nn.utils.clip_grad_norm_(trained, max_norm)


def average_at_once(engine: Any, max_norm: float) -> None:
    """Have an engine's optimizer average and clip all gradients as one vector before its step."""
    engine.enable_backward_allreduce = False
    trained = trained_of(engine.module)

    def reduce(*_: Any) -> None:
        gradients: list[Any] = [parameter.grad for parameter in trained]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(distributed.get_world_size())
        distributed.all_reduce(flat)
        norm = flat.norm()
        flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        for parameter, part in zip(trained, flat.split([parameter.numel() for parameter in trained]), strict=True):
            parameter.grad = part.view_as(parameter)
        engine._global_grad_norm = norm

    engine.optimizer.register_step_pre_hook(reduce)


@contextlib.contextmanager
def trainers_of(alternative: Alternative) -> Iterator[None]:
    """Have trainers that are made and used here take an alternative's steps."""
    from transformers import Trainer

    from lsr_scale.training.steps.engine import EngineSteps
    from lsr_scale.training.steps.finite_check import FiniteCheck

    create, prepare = FiniteCheck.create_optimizer, Trainer._prepare_for_training

    def create_sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)  # the one that is there, if there is one
        if not isinstance(optimizer, ZeroRedundancyOptimizer):
            self.optimizer = zero_redundancy(optimizer)
        return self.optimizer

    def prepare_unpatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else {}
        if alternative.flat:
            config["gradient_clipping"] = 0.0
        prepared = prepare(self, *args, **kwargs)
        if alternative.flat:
            config["gradient_clipping"] = self.args.max_grad_norm
            average_at_once(self.deepspeed, self.args.max_grad_norm)
        if not alternative.stock:
            without_walks(self)
        return prepared

    with contextlib.ExitStack() as changes:
        if not alternative.patched:
            changes.enter_context(mock.patch.object(EngineSteps, "_prepare_for_training", prepare_unpatched))
        if alternative.zero_redundancy:
            changes.enter_context(mock.patch.object(FiniteCheck, "create_optimizer", create_sharded))
        yield


def trained(folder: Path, args: argparse.Namespace, alternative: Alternative, point: str, meter: Meter) -> Any:
    """Train a run by an alternative, and return its trainer."""
    from accelerate.utils import DistributedDataParallelKwargs

    from lsr_scale.config import run_from_dict
    from lsr_scale.run.folder import RunFolder
    from lsr_scale.training import assembly, trainers

    tokens, seq_len = map(int, point.split("x"))
    steps = {"steps": WARM_UP + args.steps + COUNTED, "logging_steps": WARM_UP}
    run = run_of(
        folder, argparse.Namespace(**{**vars(args), **steps, "tokens": tokens, "seq_len": seq_len}), "save", "unused"
    )
    run["data"] = {"train": [str(folder / f"rows-{point}.jsonl")]}
    run["training"]["max_grad_norm"] = float(alternative.clips)
    run["deepspeed"] = {"config": None if alternative.zero is None else {"zero_optimization": alternative.zero}}
    with trainers_of(alternative), trainers.ignore_library_warnings():
        trainer: Any = assembly.build_trainer(run_from_dict(run), RunFolder(folder / "unused"), [meter])
        if alternative.zero_redundancy:  # or accelerate asks for its state, which is on no process as a whole
            trainer.accelerator.device_placement = False
        if alternative.one_bucket:
            trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(
                bucket_cap_mb=1024, gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False
            )
        trainer.train()
    return trainer


def measure(folder: Path, args: argparse.Namespace, alternative: Alternative, point: str) -> dict[str, Any]:
    """Return what a round of an alternative takes: see this module's docstring."""
    meter, peak = Meter(args.steps, args.device), None
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = trained(folder, args, alternative, point, meter)
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    logged = [row for row in trainer.state.log_history if "loss" in row]
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
    del trainer, engine
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    norms = [float(row["grad_norm"]) for row in logged if row.get("grad_norm") is not None]
    return {
        **{"ms": meter.ms, "cpu_ms": meter.cpu_ms, **meter.counts, "peak_memory_gib": peak},
        **{"losses": [row["loss"] for row in logged], "norms": norms},
    }


def row_of(name: str, point: str, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a row of the result, of all rounds so far."""
    tokens, seq_len = map(int, point.split("x"))
    row = {"alternative": name, "tokens": tokens, "seq_len": seq_len, **rounds[name][-1]}
    for key, ratio in (("ms", "ratio"), ("cpu_ms", "cpu_ratio")):
        mine = [one[key] for one in rounds[name]]
        base = [one[key] for one in rounds.get("patched_zero1", [])]
        row |= {key: statistics.median(mine), f"{key}_of_rounds": mine}
        ratios = [other / one for one, other in zip(mine, base, strict=False)]
        row[ratio] = statistics.median(ratios) if ratios else None
    return {**row, "tokens_per_s": 1e3 * tokens * distributed.get_world_size() / row["ms"]}


def main(arguments: list[str] | None = None) -> int:
    """Measure in turns; the first process writes the result after each."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--alternatives", nargs="+", default=list(ALTERNATIVES), choices=list(ALTERNATIVES))
    add("--model", default="mistral-7b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="nf4", choices=["nf4", "int8", "none"])
    add("--points", nargs="+", default=["8192x2048", "64x32"], help="tokens a step and process x length of a sequence")
    add("--steps", type=int, default=20)
    add("--rounds", type=int, default=2)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--local_rank", type=int, help="the deepspeed launcher's; not read")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    import datasets

    from lsr_scale import cli, files
    from lsr_scale import distributed as processes

    cli.quiet_libraries(debug=False)
    datasets.disable_progress_bars()
    processes.start(use_deepspeed=True)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "local_rank")}
    config["processes"] = processes.world_size()
    config["command"] = recorded("speed.engine_steps", arguments or sys.argv[1:], args.out).replace(
        "python", f"torchrun --nproc_per_node {config['processes']}", 1
    )
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-steps-")) if processes.is_main() else None
        folder = Path(str(processes.broadcast(name)))
        if processes.is_main():
            write_model(folder, model_values(args.model, args.layers))
            for point in args.points:
                tokens, seq_len = map(int, point.split("x"))
                num = tokens // seq_len * (WARM_UP + args.steps + COUNTED) * config["processes"]
                write_rows(folder / f"rows-{point}.jsonl", num, seq_len)
        processes.broadcast(None)
        found: dict[str, dict[str, list[dict[str, Any]]]] = {point: {} for point in args.points}
        for point in args.points:
            for number in range(args.rounds):
                for alternative in args.alternatives:
                    one = measure(folder, args, ALTERNATIVES[alternative], point)
                    found[point].setdefault(alternative, []).append(one)
                    rows = [row_of(key, at, rounds) for at, rounds in found.items() for key in rounds]
                    env = {**files.environment(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S%z}"}
                    if processes.is_main():
                        say(f"{point}, round {number + 1}: {alternative}: {one['ms']:.1f} ms, CPU {one['cpu_ms']:.1f}")
                        files.write_json(args.out, {"env": env, "config": config, "rows": rows})
        if processes.is_main():
            show(json.loads(args.out.read_text(encoding="utf-8"))["rows"])
    processes.stop()
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was measured, a line a row."""
    for row in rows:
        say(
            f"{row['tokens']}x{row['seq_len']} {row['alternative']}: {row['ms']:.1f} ms, CPU {row['cpu_ms']:.1f} "
            f"({row['cpu_ratio'] or 1:.2f}), {row['operators']} operators, {row['collectives']} collectives, "
            f"{row['python_calls']} calls, {row['hooks']} hooks"
        )


if __name__ == "__main__":
    sys.exit(main())
