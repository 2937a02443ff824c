"""How much faster are N GPUs than one, by ZeRO stage? The ordinary training command, the same tokens on every GPU.

    python -m benchmarks.speed.scaling --gpus 1 2 --stages 1 2 3 --out benchmarks/results/scaling/NAME.json

Each row is a start of `launch/train.py` under torchrun with the shipped DeepSpeed configuration of its stage. One more
is of one GPU without DeepSpeed (`zero_stage` null), which the others are compared with. Its figure is what the command
writes to metrics.jsonl, the median over logging steps after the first two: tokens/s of all processes, and the peak of
the first one's memory. `scaling` is tokens/s over those of one GPU without DeepSpeed: N at best. 1.95 is wanted of two
GPUs at ZeRO-1 and 2, 1.7 at ZeRO-3. The parity of first losses between stages is `sharding.py`'s matter.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.trainer_overhead import PER_SPEED, TrainingError, run_of, trained, write_model, write_rows
from benchmarks.speed.workers import say


def measure(folder: Path, args: argparse.Namespace, gpus: int, stage: int | None) -> dict[str, Any]:
    """Return a row: one start of the command on so many GPUs at a ZeRO stage, or without DeepSpeed."""
    row: dict[str, Any] = {
        **{"provider": "lsr", "model": args.model, "base": args.base, "tokens": args.tokens, "seq_len": args.seq_len},
        **{"memory": args.memory, "compute": args.compute, "num_gpus": gpus, "zero_stage": stage},
    }
    run = run_of(folder, args, args.memory, f"{gpus}-{stage}")
    run["training"]["compute"] = args.compute
    if stage is not None:
        run["deepspeed"] = {"config": f"zero{stage}"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    try:
        speed, metrics = trained(folder, run, args.limit, launcher if stage is not None else [])
    except TrainingError as error:
        status = "oom" if "out of memory" in str(error) else "error"
        return {**row, "status": status, "detail": str(error)[-1000:], "tokens_per_s": None, "peak_memory_gib": None}
    peak, losses = max(row["memory_gib"] for row in metrics), [row["loss"] for row in metrics if "loss" in row]
    return {**row, "status": "ok", "tokens_per_s": speed, "peak_memory_gib": peak, "loss_first": losses[0]}


def add_scaling(rows: list[dict[str, Any]]) -> None:
    """Fill `scaling` where one GPU without DeepSpeed was measured."""
    alone = next((r for r in rows if (r["num_gpus"], r["zero_stage"], r["status"]) == (1, None, "ok")), None)
    for row in rows:
        row["scaling"] = row["tokens_per_s"] / alone["tokens_per_s"] if alone and row["status"] == "ok" else None


def main(arguments: list[str] | None = None) -> int:
    """Measure row by row and write the result after each."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    add("--stages", type=int, nargs="+", default=[1, 2, 3], choices=range(4))
    add("--model", default="mistral-7b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="nf4", choices=["nf4", "int8", "none"])
    add("--tokens", type=int, default=8192, help="tokens a step and GPU")
    add("--seq-len", type=int, default=2048)
    add("--memory", default="save", choices=["save", "speed"])
    add("--compute", default="bf16", choices=["bf16", "fp8", "int8"])
    add("--steps", type=int, default=20)
    add("--logging-steps", type=int, default=4)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--limit", type=float, default=300.0, help="seconds for each start")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.steps < PER_SPEED * args.logging_steps:
        parser.error(f"--steps: expected {PER_SPEED} times --logging-steps or more, got {args.steps}")
    from lsr_scale import files

    config = {name: value for name, value in vars(args).items() if name not in ("out", "limit")}
    config["command"] = recorded("speed.scaling", arguments or sys.argv[1:], args.out)
    cases = [(1, None), *((gpus, stage) for gpus in sorted(args.gpus) for stage in args.stages)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        write_model(folder, model_values(args.model, args.layers))
        sequences = args.tokens // args.seq_len * args.steps * max(args.gpus)
        write_rows(folder / "rows.jsonl", sequences, args.seq_len)
        for gpus, stage in cases:
            rows.append(measure(folder, args, gpus, stage))
            add_scaling(rows)
            env = {**files.environment(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            files.write_json(args.out, {"env": env, "config": config, "rows": rows})
            last = rows[-1]
            shown = f"{last['tokens_per_s']:,.0f} tokens/s" if last["status"] == "ok" else last["detail"][-300:]
            say(f"{gpus} GPUs, ZeRO {stage}: {last['status']}, {shown}, scaling {json.dumps(last['scaling'])}")
    return int(any(row["status"] == "error" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
