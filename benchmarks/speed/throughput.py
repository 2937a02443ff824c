"""Training throughput and memory of this library's fused path, beside its peers, in one interleaved run.

    python -m benchmarks.speed.throughput --model mistral-7b --base nf4 --tokens 8192 --seq-len 2048 \
        --checkpointing none,full,offload --rounds 2 --steps 4 --out benchmarks/results/throughput/NAME.json
    python -m benchmarks.speed.throughput --tokens 1024,8192,32768 --seq-len 512,2048 ...    # every pair that divides
    python -m benchmarks.speed.throughput --points 1024x512,8192x512,8192x8192 ...           # these
    python -m benchmarks.speed.throughput --smoke --out NAME.json        # two layers, seconds: does every provider run?

Random weights on a model's shapes, random tokens, every label supervised. A step is forward, loss, backward, fused
AdamW on the adapters, gradients dropped; steps follow each other without a wait for the GPU, as in training. Every
provider lives in a process of its own, because some patch libraries globally. All processes are started side by side,
then measured strictly one at a time, in rounds; a row's figures are taken over the timed steps of all rounds. The file
is written anew after every turn; an existing one is never touched.

Before anything is timed, the gate (`parity.py`): the fused layers of every method of ours that is to be measured, on
two layers of the same shapes and base, must be as near to float32 as plain bfloat16 is. If they are not, nothing is
written.

`floor_fraction` is the floor (`floors.floor_ms`), with ceilings measured in the same run, over the median step.
`mfu` counts what a frozen base needs at least, 4 FLOP per linear weight and token (forward and dX; lm_head included)
and 6 tokens x seq_len x heads x head_dim per layer for causal attention, against the device's nominal dense bf16 rate.
Neither adapters nor anything computed twice counts. `slopes` are the bytes that one more token costs in each layer:
what is kept for the backward pass.

`loss_initial` is the loss of a turn's very first step, where every adapter's update is zero: providers on the same base
and seed must agree on it, which `loss_spread` tells. Adapters are put back to their start before every turn.

Checkpointing "none" keeps everything, "mlp" (ours) all but gate and up, "full" each layer's input, "offload"
(Unsloth's) that on the host, and "auto" (ours) is `training.memory: auto`: it fills the memory that is free, which the
processes of other providers hold a part of.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.floors import (
    NOMINAL_TFLOPS,
    STORED_BYTES,
    floor_ms,
    layer_weights,
    shape_of,
)
from benchmarks.speed.providers import PROVIDERS
from benchmarks.speed.smaller_gpu import CONTEXT_GIB
from benchmarks.speed.throughput_rows import Case, add_ratios, row_of, slopes, table
from benchmarks.speed.workers import Worker, last_line, say, start_all

DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name not in ("lsr_held", "lsr_graphs", "lsr_unfused"))
BASES = ("nf4", "int8", "bf16")
CHECKPOINTING = ("none", "mlp", "full", "offload", "auto")
OWN = {"lsr", "kron_lora", "lora", "frozen"}
# who can do what beside "none" and "full", and whose mode is fixed when it is built
ABLE = {"offload": {"unsloth_lora"}, "mlp": OWN, "auto": OWN}
ONE_PROCESS_A_MODE = {"unsloth_lora"}


class ParityError(Exception):
    """The fused layers are not as exact as they should be."""


class Measurement:
    """One run of the benchmark: its cases, what was found, and the file that says so."""

    def __init__(self, config: dict[str, Any], out: Path, limits: dict[str, float]) -> None:
        """Take the configuration as it stands in the result, the JSON to write, and seconds: build, turn, all."""
        self.config, self.out, self.limits = config, out, limits
        self.began = time.monotonic()
        self.turns: dict[Case, list[dict]] = {
            Case(provider, mode, tokens, seq_len): []
            for provider in config["providers"]
            for mode in modes_of(provider, config)
            for tokens, seq_len in config["points"]
        }
        self.result: dict[str, Any] = {"env": {}, "config": config, "parity": None, "ceilings": {}, "rows": []}
        self.nominal_tflops: float | None = None
        self.workers: list[Worker] = []

    def left(self) -> float:
        """Return the seconds that are left of the limit for everything."""
        return self.limits["all"] - (time.monotonic() - self.began)

    def log(self, name: str) -> Path:
        """Return where a worker's output goes, beside the result."""
        return self.out.with_name(f"{self.out.stem}.{name.replace(':', '.')}.log")

    def save(self) -> None:
        """Write what is known so far."""
        from lsr_scale import files

        machine = {"ceilings": self.result["ceilings"], "nominal_tflops": self.nominal_tflops}
        rows = [row_of(case, self.config, found, machine) for case, found in self.turns.items()]
        add_ratios(rows)
        self.result |= {"rows": rows, "slopes": slopes(rows, self.config["shape"]["layers"])}
        files.write_json(self.out, self.result)

    def run(self, resident: bool) -> list[dict]:
        """Measure every case and write the result; the rows are returned.

        Args:
            resident: Whether all models stay in memory between the rounds; otherwise each is built again every round.

        Raises:
            ParityError: if the gate is red; then nothing is written.
        """
        from lsr_scale import files

        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.workers = plan_workers(self.config, self.log)
        try:
            if self.config["parity"]:
                self._pass_gate()
            if resident:
                start_all(self.workers, min(self.limits["build"], self.left()))
            self.result["env"] = environment(files.environment())
            gpus = self.result["env"]["gpus"]
            self.nominal_tflops = next(
                (rate for name, rate in NOMINAL_TFLOPS.items() if any(name in gpu for gpu in gpus)), None
            )
            if self.config["ceilings"]:
                self._measure_ceilings()
            self.save()
            for number in range(self.config["rounds"]):
                for worker in self.workers:
                    self._round(worker, f"round {number + 1}", resident)
            if resident and len(self.workers) > 1:
                self._measure_the_starved_alone()
        finally:
            for worker in self.workers:
                worker.stop()
        self._finish()
        return self.result["rows"]

    def _ask_once(self, name: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers of a worker that is started for these requests."""
        worker = Worker(name, ["none"], self.config, self.log(name))
        try:
            start_all([worker], min(self.limits["build"], self.left()))
            return [worker.ask(request, min(self.limits["turn"], self.left())) for request in requests]
        finally:
            worker.stop()

    def _pass_gate(self) -> None:
        (reply,) = self._ask_once("benchmarks.speed.parity:Parity", [{}])
        if reply["status"] != "ok":
            raise ParityError(reply["detail"])
        self.result["parity"] = reply["parity"]
        problems = [problem for row in reply["parity"] for problem in row["problems"]]
        if problems:
            raise ParityError("\n".join(problems))
        worst = {f"{row['method']} {row['recompute']}": round(row["worst_ratio"], 2) for row in reply["parity"]}
        say(f"parity: green; largest error over plain bfloat16's: {json.dumps(worst)}")

    def _measure_ceilings(self) -> None:
        points = self.config["points"]
        requests = [{"tokens": tokens, "seq_len": seq_len} for tokens, seq_len in points]
        for (tokens, seq_len), reply in zip(
            points, self._ask_once("benchmarks.speed.ceilings:Ceilings", requests), strict=True
        ):
            point = f"{tokens}x{seq_len}"
            if reply["status"] != "ok":
                say(f"ceilings {point}: {reply['status']} {last_line(reply)}; its rows will have no floor_fraction")
                continue
            found = self.result["ceilings"][point] = reply["ceilings"]
            self.result.setdefault("floors_ms", {})[point] = {
                mode: floor_ms(self.config["shape"], tokens, self.config["base"], mode, found)
                for mode in self.config["checkpointing"]
                if mode in ("none", "full")
            }
            say(f"ceilings {point}: {json.dumps(found)}\nfloors: {json.dumps(self.result['floors_ms'][point])}")

    def _round(self, worker: Worker, name: str, resident: bool) -> None:
        """Have a worker measure each of its cases once, but those that failed before."""
        cases = [case for case in self.turns if case.provider == worker.provider and case.mode in worker.modes]
        cases = [case for case in cases if all(turn["status"] == "ok" for turn in self.turns[case])]
        if not cases or self.left() <= 0:
            return
        if not resident:
            start_all([worker], min(self.limits["build"], self.left()))
        for case in cases:
            if self.left() > 0:
                self._turn(worker, case, name)
        if not resident:
            worker.stop()

    def _turn(self, worker: Worker, case: Case, name: str) -> None:
        request = {"mode": case.mode, "tokens": case.tokens, "seq_len": case.seq_len, "profile": None}
        if self.config["profile"] and not self.turns[case]:
            stem = f"{self.out.stem}.{case.provider.replace(':', '.')}.{case.mode}.{case.point}"
            request["profile"] = str(self.out.with_name(f"{stem}.profile.txt"))
        reply = worker.ask(request, min(self.limits["turn"], self.left()))
        if name == "alone" and reply["status"] == "ok":
            reply.setdefault("notes", []).append("measured alone, after the rounds: it did not fit beside the others")
            self.turns[case] = []
        self.turns[case].append(reply)
        speed = ""
        if reply["status"] == "ok":
            median = statistics.median(reply["step_ms"])
            peak = "" if reply["peak_memory_gib"] is None else f", {reply['peak_memory_gib']:.2f} GiB"
            speed = f" {1e3 * case.tokens / median:,.0f} tokens/s, {median:.1f} ms{peak}"
            speed += f", loss {reply['loss_first']:.3f} -> {reply['loss_last']:.3f}"
        say(f"{name}: {case.provider} {case.mode} {case.point}: {reply['status']}{speed} {last_line(reply)}")
        self.save()

    def _measure_the_starved_alone(self) -> None:
        """Measure again, with nobody else in memory, what ran out of it."""
        starved = [case for case, found in self.turns.items() if found and found[-1]["status"] == "oom"]
        if starved:
            for worker in self.workers:
                worker.stop()
        for provider, mode in dict.fromkeys((case.provider, case.mode) for case in starved):
            if self.left() <= 0:
                return
            alone = Worker(provider, [mode], self.config, self.log(f"{provider}.alone"))
            start_all([alone], min(self.limits["build"], self.left()))
            for case in starved:
                if (case.provider, case.mode) == (provider, mode) and self.left() > 0:
                    self._turn(alone, case, "alone")
            alone.stop()

    def _finish(self) -> None:
        initial: dict[tuple[int, int], list[float]] = {}
        for row in self.result["rows"]:
            if row["status"] == "ok":
                initial.setdefault((row["tokens"], row["seq_len"]), []).append(row["loss_initial"])
        spread = max((max(found) - min(found) for found in initial.values()), default=None)
        self.result["loss_spread"] = spread
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        self.save()
        say("\n" + table(self.result["rows"]))
        if spread is not None:
            say(f"the first losses lie within {spread:.2g} of each other; {self.result['seconds']} s in all")


def modes_of(provider: str, config: dict[str, Any]) -> list[str]:
    """Return the kinds of checkpointing under which a provider is measured."""
    return [mode for mode in config["checkpointing"] if mode not in ABLE or provider in ABLE[mode]]


def plan_workers(config: dict[str, Any], log: Any) -> list[Worker]:
    """Return the workers of a run, in the order in which they are measured."""
    workers = []
    for provider in config["providers"]:
        modes = modes_of(provider, config)
        if provider in ONE_PROCESS_A_MODE:
            workers += [Worker(provider, [mode], config, log(f"{provider}.{mode}")) for mode in modes]
        elif modes:
            workers.append(Worker(provider, modes, config, log(provider)))
    return workers


def query_gpu(fields: str) -> list[str]:
    """Return what nvidia-smi says of the first GPU, nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.strip().split("\n")[0].split(",")]


def gpu_memory_gib() -> float:
    """Return the memory of the first GPU, 0 without one."""
    found = query_gpu("memory.total")
    if found:
        return float(found[0]) / 1024
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def environment(found: dict[str, Any]) -> dict[str, Any]:
    """Return the library's record of the machine with the peers' versions, the driver, clocks and date."""
    versions: dict[str, str | None] = {}
    for package in ("unsloth", "unsloth_zoo", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    values = query_gpu(",".join(fields))
    gpu = dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**found, **versions, "gpu_state": gpu, "date": date}


def stays_resident(config: dict[str, Any], workers: int, memory_gib: float) -> bool:
    """Whether all models together leave half of the GPU's memory to the one that is measured."""
    if config["device"] == "cpu":
        return True
    shape = config["shape"]
    weights = STORED_BYTES[config["base"]] * shape["layers"] * layer_weights(shape)
    weights += 4 * shape["hidden"] * shape["vocab"]
    return workers * (weights / 2**30 + 1.0) <= 0.5 * memory_gib


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command line and the run's configuration; a wrong value ends the program with one line."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add("--providers", type=listed, default=list(DEFAULT_PROVIDERS), help=f"of {', '.join(PROVIDERS)}; comma between")
    add("--model", default="mistral-7b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="nf4", choices=BASES)
    numbers = lambda text: [int(part) for part in listed(text)]  # noqa: E731
    add("--tokens", type=numbers, default=[8192], help="tokens a step; several with commas between")
    add("--seq-len", type=numbers, default=[2048], help="as --tokens; pairs that do not divide are left out")
    pairs = lambda text: [[int(part) for part in pair.split("x")] for pair in listed(text)]  # noqa: E731
    add("--points", type=pairs, help="instead of --tokens and --seq-len, pairs of them: 1024x512,8192x2048")
    add(
        "--checkpointing",
        type=listed,
        default=["none", "full"],
        help="of none, full, mlp and auto (ours), offload (Unsloth's)",
    )
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=4, help="timed steps a round")
    add("--warmup", type=int, default=2, help="steps before them, each round")
    add("--seed", type=int, default=0)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--without-autocast", type=listed, default=[], help="providers that run without bf16 autocast")
    add("--memory-gib", type=float, help="let no process take more of the GPU's memory: what would fit a smaller card")
    add("--profile", action="store_true", help="also write each provider's kernels by time, one step, beside --out")
    add("--no-ceilings", action="store_true", help="measure no ceilings: no floor_fraction")
    add("--no-parity", action="store_true", help="time without the gate; the result says so")
    add("--smoke", action="store_true", help="2 layers, 512 tokens of 256, one round of 2 steps: does it all run?")
    add("--resident", choices=["auto", "yes", "no"], default="auto", help="keep all models in memory between rounds")
    add("--build-limit", type=float, default=240.0, help="seconds for building, all side by side")
    add("--turn-limit", type=float, default=120.0, help="seconds for one provider's turn")
    add("--time-limit", type=float, default=1e9, help="seconds for everything; what is not reached is said")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.layers, args.tokens, args.seq_len, args.rounds, args.steps = args.layers or 2, [512], [256], 1, 2
    for name in args.providers:
        if name not in PROVIDERS and ":" not in name:
            parser.error(f"--providers: unknown provider {name!r}; there are {', '.join(PROVIDERS)}, or module:Class")
    for name in args.checkpointing:
        if name not in CHECKPOINTING:
            parser.error(f"--checkpointing: unknown kind {name!r}; there are {', '.join(CHECKPOINTING)}")
    if not args.providers or not args.checkpointing:
        parser.error("--providers and --checkpointing need at least one name each")
    for option in ("tokens", "seq_len", "rounds", "steps"):
        given = getattr(args, option)
        if min(given if isinstance(given, list) else [given], default=0) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {given}")
    points = [[tokens, length] for tokens in args.tokens for length in args.seq_len if tokens % length == 0]
    if args.points is not None:
        points = args.points
        if not points or any(len(pair) != 2 or min(pair) < 1 or pair[0] % pair[1] for pair in points):
            parser.error("--points: expected pairs like 8192x2048, the first a multiple of the second")
    if not points:
        parser.error(f"--tokens: {args.tokens} is no multiple of --seq-len {args.seq_len}")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers: expected at least 1, got {args.layers}")
    if args.memory_gib is not None and args.memory_gib <= CONTEXT_GIB:
        parser.error(f"--memory-gib: expected more than {CONTEXT_GIB}, got {args.memory_gib:g}")
    if args.out.suffix != ".json":
        parser.error(f"--out: {args.out} should end in .json")
    values = model_values(args.model, args.layers)
    longest = max(length for _, length in points)
    if longest > values["max_position_embeddings"]:
        parser.error(f"--seq-len: {args.model} has {values['max_position_embeddings']} positions, not {longest}")
    names = ("providers", "model", "layers", "base", "checkpointing", "rounds", "steps", "warmup")
    config = {name: getattr(args, name) for name in (*names, "seed", "device", "without_autocast", "profile", "smoke")}
    config["providers"] = list(dict.fromkeys(args.providers))
    config["checkpointing"] = list(dict.fromkeys(args.checkpointing))
    config["points"] = points
    config["graphs_in_peak"] = True
    if args.memory_gib is not None:
        config["memory_gib"] = args.memory_gib
    config["ceilings"] = not args.no_ceilings and args.device == "cuda"
    config["parity"] = not args.no_parity
    config["values"], config["shape"] = values, shape_of(values)
    config["command"] = recorded("speed.throughput", arguments or sys.argv[1:], args.out)
    return args, config


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if anything could be measured, 3 if the gate is red."""
    args, config = parse(arguments)
    memory = 0.0 if args.device == "cpu" else gpu_memory_gib()
    if args.device == "cuda" and not memory:
        print("there is no GPU here; --device cpu tries the program on a CPU", file=sys.stderr)
        return 2
    count = len(plan_workers(config, lambda name: Path(name)))
    resident = stays_resident(config, count, memory) if args.resident == "auto" else args.resident == "yes"
    kept = "all models stay in memory" if resident else "one model at a time is in memory"
    say(f"{count} processes, {kept}; {config['command']}")
    limits = {"build": args.build_limit, "turn": args.turn_limit, "all": args.time_limit}
    try:
        rows = Measurement(config, args.out, limits).run(resident)
    except ParityError as error:
        print(f"parity: red, nothing is measured\n{error}", file=sys.stderr)
        return 3
    say(f"\n{args.out}")
    return 0 if any(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
