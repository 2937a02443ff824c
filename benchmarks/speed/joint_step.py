"""What does a step of many adapters at once cost, beside steps of one adapter, and of none?

    python -m benchmarks.speed.joint_step --cases smollm2-8,mistral-8,smollm2-64x512,smollm2-64x1024 \
        --time-limit 540 --out benchmarks/results/joint_step/NAME.json
    python -m benchmarks.speed.joint_step --cases mistral-8 --profile --out NAME.json      # kernels by time beside it

Random weights on a model's shapes, random tokens, documents of one length, every label supervised. A case has n trials
of LSR-Adapt on all seven linears, of t tokens each. Ways, each of them timed in turns, as they are and as CUDA graphs:

    joint       one step of the n trials at once
    long        one adapter with n t tokens
    short       one adapter with t tokens: n such steps are what `joint` replaces
    base        no adapter, n t tokens: the gradient flows through the base alone

A step is forward, loss, backward and fused AdamW; steps follow each other without a wait for the GPU. The joint step's
AdamW is on one vector a trial, of which the factors are views. `sequential_ratio` is n short steps over a joint one
(`bare` and `graphs`), `long_ratio` a long step over a joint one, `base_ratio` the base's over a joint one.
`graphs_over_bare` is n bare short steps over a replayed joint one. `gib` is what a way's first turn takes beyond what
was in memory before it; graphs keep theirs.

The file is written anew after every turn, so that a run which the limit cuts short leaves what it has measured.
"""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import LINEARS, model_values
from benchmarks.speed.measurement import environment
from benchmarks.speed.providers.base import LEARNING_RATE, base_model, elapsed_ms
from benchmarks.speed.workers import say


class Case(NamedTuple):
    """n trials of t tokens each, in documents of `length`; LSR-Adapt's rank and separation rank."""

    model: str
    base: str
    trials: int
    tokens: int
    length: int
    rank: int


CASES = {
    "smollm2-8": Case("smollm2-135m", "bf16", 8, 4096, 512, 16),
    "mistral-8": Case("mistral-7b", "nf4", 8, 1024, 1024, 16),
    "smollm2-64x512": Case("smollm2-135m", "bf16", 64, 512, 512, 4),
    "smollm2-64x1024": Case("smollm2-135m", "bf16", 64, 1024, 512, 4),
    "tiny": Case("tiny", "bf16", 3, 32, 16, 4),
}
WAYS = ("joint", "long", "short", "base")
GRAPHS = "_graphs"

Step = Callable[[], Tensor]


class Models:
    """The models of a case, all on one base in memory."""

    def __init__(self, case: Case, args: Any, device: torch.device) -> None:
        """Make the base; the others are made when a way needs them."""
        from lsr_scale.layers.frozen_linear import freeze_quantized

        self.case, self.args, self.device = case, args, device
        values = model_values(case.model, args.layers)
        config = {"values": values, "base": case.base, "device": device.type, "seed": 0}
        self.base = base_model(config)
        freeze_quantized(self.base)
        self.vocabulary: int = values["vocab_size"]

    def fused(self, model: Any) -> Any:
        """Return a model, fused, in training."""
        import lsr_scale

        report = lsr_scale.fuse(model.train(), recompute=self.args.recompute, cache_weights=self.args.cache_weights)
        assert not report.unfused, report
        return model

    def alone(self) -> Any:
        """Return a model with one adapter."""
        from peft import get_peft_model

        from lsr_scale.adapters import peft_config
        from lsr_scale.model.share import share_base

        options = {"target_modules": LINEARS, "rank": self.case.rank, "separation_rank": self.case.rank}
        return self.fused(get_peft_model(share_base(self.base), peft_config("lsr", options, "CAUSAL_LM")))

    def joint(self) -> tuple[Any, list[list[Tensor]], list[Tensor]]:
        """Return the model of all trials; the factors of each, and the vector that they are views of.

        Trials' layers are made without models around them: what a step reads of a trial.
        """
        from lsr_scale.adapters import METHODS
        from lsr_scale.adapters.joint import JointLinear
        from lsr_scale.adapters.peft import AdapterLinear
        from lsr_scale.model.share import share_base

        method, model = METHODS["lsr"], share_base(self.base)
        config = method.config_class(rank=self.case.rank, separation_rank=self.case.rank)  # pyright: ignore
        factors: list[list[Tensor]] = [[] for _ in range(self.case.trials)]
        for path, linear in list(model.named_modules()):
            parent, _, name = path.rpartition(".")
            if name in LINEARS:
                layers = [AdapterLinear(linear, method) for _ in factors]
                for layer, own in zip(layers, factors, strict=True):
                    layer.update_layer("default", config)
                    own += layer.factors("default").values()
                setattr(model.get_submodule(parent), name, JointLinear(linear, layers))
        vectors = [torch.cat([factor.detach().reshape(-1) for factor in own]) for own in factors]
        for own, vector in zip(factors, vectors, strict=True):
            for factor, part in zip(own, vector.split([factor.numel() for factor in own]), strict=True):
                factor.data = part.view_as(factor)
        return self.fused(model), factors, vectors

    def batch(self, tokens: int, seed: int) -> dict[str, Any]:
        """Return a static batch of so many tokens, on the device."""
        from lsr_scale.fused.cuda_graphs import static_batch

        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocabulary, (1, tokens), generator=generator)
        positions = (torch.arange(tokens) % self.case.length)[None]
        labels = ids.masked_fill(positions == 0, -100)
        batch = static_batch(ids, labels, positions, longest=self.case.length)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def joint_way(models: Models, replayed: bool) -> Step:
    """Return the step of all trials."""
    from lsr_scale.fused.joint_graphs import JointGraphs, join_static

    n = models.case.trials
    model, factors, vectors = models.joint()
    graphs = JointGraphs(model, factors)  # pyright: ignore[reportArgumentType]
    batch = join_static([models.batch(models.case.tokens, seed) for seed in range(n)])
    divisors = batch["weights"].view(n, -1).sum(1)
    optimizer = torch.optim.AdamW(vectors, lr=LEARNING_RATE, fused=models.device.type == "cuda")

    def step() -> Tensor:
        losses, gradients = (graphs.replay if replayed else graphs._outputs)(batch, divisors)
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.grad = gradient
        optimizer.step()
        return losses.sum()

    return step


def alone_way(models: Models, replayed: bool, tokens: int) -> Step:
    """Return the step of one adapter."""
    from lsr_scale.fused.cuda_graphs import StepGraphs, static_loss

    model = models.alone()
    graphs, batch = StepGraphs(model.get_base_model()), models.batch(tokens, 0)
    divisor = batch["weights"].sum()
    optimizer = torch.optim.AdamW(graphs.parameters, lr=LEARNING_RATE, fused=models.device.type == "cuda")

    def step() -> Tensor:
        if replayed:
            loss, gradients = graphs.replay(batch, divisor)
            graphs.add_to_grads(gradients)
        else:
            loss = static_loss(model.get_base_model(), batch) / divisor
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def base_way(models: Models, replayed: bool) -> Step:
    """Return the step of the base, which ends at the gradient of the embeddings' output."""
    from lsr_scale.fused.cuda_graphs import StepGraphs, static_loss
    from lsr_scale.model.share import share_base

    model = models.fused(share_base(models.base))

    class BaseGraphs(StepGraphs):
        def _outputs(self, batch: dict[str, Any], divisor: Tensor) -> tuple[Tensor, list[Tensor]]:
            embedded: list[Tensor] = []
            keep = lambda _, args, out: embedded.append(out.requires_grad_())  # noqa: E731
            handle = model.get_input_embeddings().register_forward_hook(keep)
            loss = static_loss(model, batch) / divisor
            handle.remove()
            return loss.detach(), list(torch.autograd.grad(loss, embedded))

    graphs, batch = BaseGraphs(model), models.batch(models.case.trials * models.case.tokens, 0)
    divisor = batch["weights"].sum()
    return lambda: (graphs.replay if replayed else graphs._outputs)(batch, divisor)[0]


def way_of(models: Models, name: str) -> Step:
    """Return a way's step."""
    replayed, kind = name.endswith(GRAPHS), name.removesuffix(GRAPHS)
    if kind == "joint":
        return joint_way(models, replayed)
    if kind == "base":
        return base_way(models, replayed)
    return alone_way(models, replayed, models.case.tokens * (models.case.trials if kind == "long" else 1))


def mark(device: torch.device) -> Any:
    """Return a mark of now in the device's queue of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def turn(step: Step, args: Any, device: torch.device) -> list[float]:
    """Return the milliseconds of each timed step."""
    for _ in range(args.warmup):
        step()
    marks = [mark(device)]
    for _ in range(args.steps):
        step()
        marks.append(mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [elapsed_ms(begin, end) for begin, end in itertools.pairwise(marks)]


def write_profile(step: Step, path: Path) -> None:
    """Write the kernels that take the most time in one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    text = profiled.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=100)
    path.write_text(text + "\n", encoding="utf-8")


def ratios(case: Case, ms: dict[str, float]) -> dict[str, float]:
    """Return a case's ratios by the median steps that there are."""
    found: dict[str, float] = {}
    for kind, ending in (("bare", ""), ("graphs", GRAPHS)):
        joint = ms.get("joint" + ending)
        for name, other, factor in (("sequential", "short", case.trials), ("long", "long", 1), ("base", "base", 1)):
            if joint and other + ending in ms:
                found[f"{name}_ratio_{kind}"] = factor * ms[other + ending] / joint
    if "joint" + GRAPHS in ms and "short" in ms:
        found["graphs_over_bare"] = case.trials * ms["short"] / ms["joint" + GRAPHS]
    return found


def row_of(name: str, times: dict[str, list[float]], gib: dict[str, float], status: dict[str, str]) -> dict[str, Any]:
    """Return a case's row."""
    case = CASES[name]
    ms = {way: statistics.median(values) for way, values in times.items() if values}
    tokens = {way: case.tokens * (1 if way.startswith("short") else case.trials) for way in ms}
    speeds = {way: 1e3 * tokens[way] / value for way, value in ms.items()}
    return {
        **{"case": name, **case._asdict(), "step_ms": ms, "steps_ms": times, "tokens_per_s": speeds},
        **{"gib": gib, "status": status, **ratios(case, ms)},
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the result; the exit status is 0 if every way of every case was timed."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add("--cases", type=listed, default=[name for name in CASES if name != "tiny"], help=f"of {', '.join(CASES)}")
    add("--ways", type=listed, default=list(WAYS), help=f"of {', '.join(WAYS)}")
    add("--without-graphs", action="store_true", help="leave the replayed steps out")
    add("--without-bare", action="store_true", help="leave out those that are not replayed")
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--recompute", default="none", choices=["none", "mlp", "full"])
    add("--cache-weights", action="store_true", help="keep quantized weights dequantized")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=6, help="timed steps a turn")
    add("--warmup", type=int, default=2, help="steps before them, each turn")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--profile", action="store_true", help="also write the kernels of the replayed joint and long steps")
    add("--time-limit", type=float, default=1e9, help="seconds for everything")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    for option, known in (("cases", list(CASES)), ("ways", list(WAYS))):
        if unknown := sorted(set(getattr(args, option)) - set(known)):
            parser.error(f"--{option}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    from lsr_scale import files

    device, began = torch.device(args.device), time.monotonic()
    endings = [*([] if args.without_bare else [""])]
    endings += [GRAPHS] if device.type == "cuda" and not args.without_graphs else []
    names = [way + ending for ending in reversed(endings) for way in args.ways]
    config = {key: value for key, value in vars(args).items() if key != "out"}
    config["command"] = recorded("speed.joint_step", arguments or sys.argv[1:], args.out)
    result: dict[str, Any] = {"env": environment(files.environment()), "config": config, "rows": {}}
    complete = True
    for case in args.cases:
        if time.monotonic() - began > args.time_limit:
            say(f"{case}: not measured, the time is up")
            complete = False
            continue
        models = Models(CASES[case], args, device)
        say(f"{case}: {CASES[case]}; the base is made, {time.monotonic() - began:.0f} s")
        steps: dict[str, Step] = {}
        times: dict[str, list[float]] = {name: [] for name in names}
        gib: dict[str, float] = {}
        status: dict[str, str] = {}
        for number in range(args.rounds):
            for name in names:
                if status.get(name, "ok") != "ok" or time.monotonic() - began > args.time_limit:
                    complete = False
                    continue
                try:
                    gc.collect()
                    before = 0
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                        before = torch.cuda.memory_allocated()
                        torch.cuda.reset_peak_memory_stats()
                    if name not in steps:
                        steps[name] = way_of(models, name)
                    found = turn(steps[name], args, device)
                    if device.type == "cuda":
                        gib.setdefault(name, (torch.cuda.max_memory_allocated() - before) / 2**30)
                    times[name] += found
                    status[name] = "ok"
                    say(f"{case}, round {number + 1}: {name} {statistics.median(found):.2f} ms")
                except torch.OutOfMemoryError as error:
                    status[name] = str(error).split("\n")[0][:200]
                    say(f"{case}: {name}: {status[name]}")
                result["rows"][case] = row_of(case, times, gib, status)
                files.write_json(args.out, result)
        if args.profile and device.type == "cuda":
            for name in ("joint" + GRAPHS, "long" + GRAPHS):
                if name in steps:
                    write_profile(steps[name], args.out.with_name(f"{args.out.stem}.{case}.{name}.txt"))
        row = result["rows"].get(case, {})
        compared = {key: value for key, value in row.items() if "_ratio_" in key or key == "graphs_over_bare"}
        say(f"{case}: " + ", ".join(f"{key} {value:.2f}" for key, value in compared.items()))
        del models, steps
        gc.collect()
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
