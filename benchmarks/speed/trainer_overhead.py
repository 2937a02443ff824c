"""Is the ordinary training command as fast as a bare loop over the same layers?

    python -m benchmarks.speed.trainer_overhead --out benchmarks/results/trainer_overhead/NAME.json

Both train LSR-Adapt on the same random base, shapes, tokens a step and memory policy, in turns. The command is
`lsr-scale train` as a user gives it: TRL's trainer on packed rows, the learning rate's schedule, clipping, logging;
its figure is what it writes to metrics.jsonl, the median over logging steps after the first two. The bare loop is
`throughput.py`'s `lsr` (or `lsr_held`): forward, backward, AdamW, nothing else. The ratio is the command's speed over
the loop's; 0.97 is wanted.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.command_line import new_file, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.processes import kill_all
from benchmarks.speed.floors import shape_of
from benchmarks.speed.workers import Worker, say, start_all

# training.memory, and the bare loop's provider and checkpointing that do the same
SAME = {"save": ("lsr", "full"), "speed": ("lsr_held", "none")}
PER_SPEED = 3  # logging steps for a figure: the first two are not counted
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path, values: dict[str, Any]) -> None:
    """Write a model's configuration and a tokenizer of single letters: weights are random in any case."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    AutoConfig.for_model(**values).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_rows(path: Path, rows: int, length: int) -> None:
    """Write texts of `length` tokens each, the end of text among them."""
    generator = random.Random(0)
    texts = ("".join(generator.choices(LETTERS, k=length - 1)) for _ in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


class TrainingError(RuntimeError):
    """The training command failed; the text is the end of what it said."""


def run_of(folder: Path, args: argparse.Namespace, memory: str, name: str) -> dict[str, Any]:
    """Return the run that is timed, as its YAML file has it."""
    run = {
        "model": {"name": str(folder), "random_weights": True, "quantization": args.base},
        "adapter": {"method": "lsr", "rank": 16, "alpha": 32.0, "separation_rank": 16},
        "data": {"train": [str(folder / "rows.jsonl")]},
        "training": {
            **{"max_steps": args.steps, "per_device_train_batch_size": args.tokens // args.seq_len},
            **{"gradient_accumulation_steps": 1, "max_length": args.seq_len, "packing": True, "memory": memory},
            **{"learning_rate": 1e-4, "logging_steps": args.logging_steps, "save_strategy": "no"},
            **{"output_dir": str(folder / f"run-{name}"), "fused": "on"},
        },
        "eval": {"tasks": []},
    }
    run["adapter"]["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if args.device == "cpu":
        run["model"]["dtype"] = "float32"
    return run


def trained(folder: Path, run: dict[str, Any], limit: float, launcher: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """Run the training command and return its tokens/s and what it logged.

    Raises:
        TrainingError: if it fails or takes longer than `limit` seconds.
    """
    config = folder / "run.yaml"
    config.write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
    words = [str(ROOT / "launch/train.py"), "--config", str(config), "--overwrite", "--quiet"]
    start = [sys.executable, *launcher, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(start, **pipes) as process:
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise TrainingError(f"{' '.join(start)} took more than {limit:.0f} s") from error
        finally:
            kill_all(process)
    if process.returncode:
        raise TrainingError(f"{' '.join(start)} failed:\n{said[-2000:]}")
    text = (Path(run["training"]["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    speeds = [row["tokens_per_s"] for row in metrics if "tokens_per_s" in row]
    if len(speeds) < PER_SPEED:
        raise TrainingError(f"{len(speeds)} logging steps are too few; raise --steps")
    return statistics.median(speeds[PER_SPEED - 1 :]), metrics


def bare(memory: str, args: argparse.Namespace, values: dict[str, Any], log: Path) -> float:
    """Return the tokens/s of the bare loop, in a process of its own."""
    provider, mode = SAME[memory]
    config = {
        **{"model": args.model, "base": args.base, "values": values, "shape": shape_of(values), "device": args.device},
        **{"points": [[args.tokens, args.seq_len]], "warmup": 3, "steps": args.logging_steps * 2, "seed": 0},
        **{"providers": [provider], "without_autocast": [provider], "checkpointing": [mode]},
    }
    worker = Worker(provider, [mode], config, log)
    start_all([worker], args.limit)
    try:
        reply = worker.ask({"mode": mode, "tokens": args.tokens, "seq_len": args.seq_len}, args.limit)
    finally:
        worker.stop()
    if reply["status"] != "ok":
        raise SystemExit(f"{provider} {mode}: {reply['status']}: {reply['detail']}")
    return 1e3 * args.tokens / statistics.median(reply["step_ms"])


def row_of(memory: str, tokens_per_s: dict[str, list[float]]) -> dict[str, Any]:
    """Return a row of the result: the speeds of all rounds so far, and the ratio of their medians."""
    ratio = statistics.median(tokens_per_s["command"]) / statistics.median(tokens_per_s["bare"])
    return {"memory": memory, **tokens_per_s, "ratio": ratio}


def main(arguments: list[str] | None = None) -> int:
    """Measure in turns and write the result."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default="mistral-7b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="nf4", choices=["nf4", "int8", "none"])
    add("--tokens", type=int, default=8192, help="tokens a step")
    add("--seq-len", type=int, default=2048)
    add("--steps", type=int, default=30, help="of the command")
    add("--logging-steps", type=int, default=5)
    add("--memory", nargs="+", default=list(SAME), choices=list(SAME))
    add("--rounds", type=int, default=2)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--limit", type=float, default=240.0, help="seconds for each of the processes")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    from lsr_scale import files

    values = model_values(args.model, args.layers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "limit")}
    table: list[dict[str, Any]] = []
    rows: dict[str, dict[str, list[float]]] = {memory: {"command": [], "bare": []} for memory in args.memory}
    with tempfile.TemporaryDirectory(prefix="trainer-overhead-") as name:
        folder = Path(name)
        write_model(folder, values)
        write_rows(folder / "rows.jsonl", args.tokens // args.seq_len * args.steps, args.seq_len)
        for number in range(args.rounds):
            for memory, speeds in rows.items():
                speeds["bare"].append(bare(memory, args, values, args.out.with_suffix(f".{memory}.log")))
                try:
                    speeds["command"].append(trained(folder, run_of(folder, args, memory, memory), args.limit, [])[0])
                except TrainingError as error:
                    raise SystemExit(str(error)) from error
                say(f"round {number + 1}: {memory}: {json.dumps({key: round(v[-1]) for key, v in speeds.items()})}")
                table = [row_of(memory, speeds) for memory, speeds in rows.items() if speeds["command"]]
                files.write_json(args.out, {"env": files.environment(), "config": config, "rows": table})
    for row in table:
        say(f"{row['memory']}: the command has {row['ratio']:.3f} of the bare loop's speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
