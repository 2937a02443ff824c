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

`floor_fraction` is the floor (`floors.floor_ms`), with ceilings measured in the same run, over the median step; that of
a provider in FP8 or int8 is over the floor in that.
`mfu` counts what a frozen base needs at least, 4 FLOP per linear weight and token (forward and dX; lm_head included)
and 6 tokens x seq_len x heads x head_dim per layer for causal attention, against the device's nominal dense bf16 rate.
Neither adapters nor anything computed twice counts. `slopes` are the bytes that one more token costs in each layer:
what is saved for the backward pass.

`loss_initial` is the loss of a turn's very first step, where every adapter's update is zero: providers on the same base
and seed must agree on it, which `loss_spread` tells. Adapters are put back to their start before every turn.

Checkpointing "none" saves all activations, "mlp" (ours) all but gate and up, "full" each layer's input, "offload"
(Unsloth's) that on the host, and "auto" (ours) is `training.memory: auto`: it fills the memory that is free, which the
processes of other providers hold a part of.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.floors import (
    shape_of,
)
from benchmarks.speed.measurement import Measurement, ParityError, gpu_memory_gib, plan_workers, stays_resident
from benchmarks.speed.providers import PROVIDERS
from benchmarks.speed.smaller_gpu import CONTEXT_GIB
from benchmarks.speed.workers import say

NOT_BY_DEFAULT = {
    *("lsr_held", "lsr_graphs", "lora_graphs", "kron_lora_graphs", "lsr_unfused", "peft_lora_float32"),
    *("lsr_graphs_fp8", "lora_graphs_fp8", "kron_lora_graphs_fp8"),
    *("lsr_graphs_int8", "lora_graphs_int8", "kron_lora_graphs_int8"),
}
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name not in NOT_BY_DEFAULT)
BASES = ("nf4", "int8", "bf16")
CHECKPOINTING = ("none", "mlp", "full", "offload", "auto")


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
    residence = "all models stay in memory" if resident else "one model at a time is in memory"
    say(f"{count} processes, {residence}; {config['command']}")
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
