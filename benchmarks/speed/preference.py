"""DPO and GRPO by an ordinary run's trainer, and by TRL's on PEFT's LoRA: how fast is a step, in how much memory?

    python -m benchmarks.speed.preference dpo --out benchmarks/results/preference/NAME.json
    python -m benchmarks.speed.preference grpo --model FOLDER --data GSM8K --out benchmarks/results/preference/NAME.json

`dpo` is on random weights of a model's shapes, pairs of texts of `--length` tokens each, so that nothing is padding:
tokens/s count chosen and rejected. `grpo` is on the Transformers model of FOLDER and the questions of GSM8K, a folder
of `train.jsonl.gz`; a step generates, scores and learns from `--prompts` times `--completions` completions of at most
`--new-tokens` tokens. Their rate is so low that everyone's completions stay the base's; how long they were is in the
rows. All have the same rows in the same order, LoRA the same first factors. `trl_lora_liger` is TRL's trainer with
`use_liger_kernel`. Each trainer lives in a process of its own and they take turns; "none" keeps all activations and,
of ours, dequantized weights (a run's `memory: speed`), "saved" all activations alone, as a run does by itself where
memory does not suffice for more, "full" recomputes them (`memory: save`; gradient checkpointing).
"""

import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gsm8k
from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.trainer_overhead import LETTERS, write_model
from benchmarks.speed.workers import Worker, last_line, say, start_all

TRAINERS = {"lsr": "OursLsr", "lsr_fp8": "OursLsrFp8", "lora": "Ours", "trl_lora_liger": "TrlLiger", "trl_lora": "Trl"}
MODES = ("none", "saved", "full")
OURS = ("lsr", "lsr_fp8", "lora")
DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {
        **{"trainers": ["lsr", "lsr_fp8", "lora", "trl_lora_liger"], "modes": ["none", "full"]},
        **{"steps": 10, "warm_up": 3},
    },
    "grpo": {"trainers": ["lsr", "lora", "trl_lora"], "modes": ["none"], "steps": 2, "warm_up": 1},
}
Turns = dict[tuple[str, str], list[dict[str, Any]]]  # by trainer and mode
Broken = dict[tuple[str, str], dict[str, Any]]


def write_pairs(path: Path, number: int, length: int) -> None:
    """Write preferences whose prompts and completions have `length` tokens together, the end of text among them."""
    draw = random.Random(0)
    prompt = length // 4

    def text(tokens: int) -> str:
        return "".join(draw.choices(LETTERS, k=tokens))

    rows = (
        {"prompt": text(prompt), **{name: text(length - prompt - 1) for name in ("chosen", "rejected")}}
        for _ in range(number)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_questions(data: Path, path: Path, number: int) -> None:
    """Write the first so many questions of GSM8K as prompts with their answers."""
    rows = gsm8k.read(data, "train")[:number]
    if len(rows) < number:
        raise SystemExit(f"--data: {data} has {len(rows)} questions, and a turn has {number}; lower --steps")
    path.write_text("".join(json.dumps(gsm8k.judged(row)) + "\n" for row in rows), encoding="utf-8")


def settings_of(given: Any, scratch: Path) -> dict[str, Any]:
    """Return what the trainers are made with; their rows, and the model of random weights, are written."""
    steps = given.steps + given.warm_up
    config = {
        **{"case": given.case, "base": given.base, "device": given.device, "seed": given.seed},
        **{"steps": given.steps, "warm_up": given.warm_up},
        **{"rows": str(scratch / "rows.jsonl"), "scratch": str(scratch)},
    }
    if given.case == "dpo":
        values, folder = model_values(given.model, given.layers), scratch / "model"
        write_model(folder, values)
        write_pairs(Path(config["rows"]), given.pairs * steps, given.length)
        of_case = {"folder": None, "values": values, "batch": given.pairs, "accumulation": 1, "length": given.length}
    else:
        folder = Path(given.model).resolve()
        write_questions(given.data, Path(config["rows"]), given.prompts * steps)
        completions = given.prompts * given.completions
        batch = min(given.micro_batch, completions)
        of_case = {"folder": str(folder), "batch": batch, "accumulation": completions // batch}
        of_case |= {"completions": given.completions, "new_tokens": given.new_tokens}
    return {**config, **of_case, "model_folder": str(folder)}


def measure_all(given: Any, config: dict[str, Any], keep: Callable[[Turns, Broken], None]) -> None:
    """Have every trainer take its turns, mode after mode.

    Args:
        given: The arguments.
        config: What the trainers are made with.
        keep: Given all turns so far, and how those broke that did, after each turn: who is cut off keeps them.
    """
    ended = time.monotonic() + given.time_limit
    turns: Turns = {}
    broken: Broken = {}
    for mode in given.modes:
        workers = {
            name: Worker(
                f"benchmarks.speed.preference_trainers:{TRAINERS[name]}",
                [mode],
                config,
                given.out.with_name(f"{given.out.stem}.{name}.{mode}.log"),
            )
            for name in given.trainers
        }
        try:
            start_all(list(workers.values()), min(300.0, ended - time.monotonic()))
            for number, (name, worker) in itertools.product(range(given.rounds), workers.items()):
                reply = worker.ask({}, ended - time.monotonic())
                shown = ""
                if reply["status"] == "ok":
                    turns.setdefault((name, mode), []).append(reply)
                    shown = f"{statistics.median(reply['step_s']):.3f} s a step"
                else:
                    broken[name, mode] = worker.broken = reply
                say(f"round {number + 1}: {name} {mode}: {reply['status']} {shown} {last_line(reply)}")
                keep(turns, broken)
        finally:
            for worker in workers.values():
                worker.stop()


def row_of(config: dict[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a trainer's row: medians over the steps of all turns, and what they were made of."""

    def of_all(name: str) -> list[float]:
        return [value for turn in turns for value in turn[name]]

    peaks = [turn["peak_memory_gib"] for turn in turns if turn["peak_memory_gib"] is not None]
    row = {
        "status": "ok",
        "step_s": statistics.median(of_all("step_s")),
        "peak_memory_gib": max(peaks, default=None),
        "trainable_parameters": turns[-1]["trainable_parameters"],
        "notes": turns[-1]["notes"],
        "turns": [{key: value for key, value in turn.items() if key not in ("status", "notes")} for turn in turns],
    }
    if config["case"] == "dpo":
        row["tokens_per_s"] = 2 * config["batch"] * config["length"] / row["step_s"]
        return row
    generation, scoring, whole = of_all("generation_s"), of_all("scoring_s"), of_all("step_s")
    rest = [a - b - c for a, b, c in zip(whole, generation, scoring, strict=True)]
    row |= {"generation_s": statistics.median(generation), "scoring_s": statistics.median(scoring)}
    row |= {"training_s": statistics.median(rest), "completion_tokens": statistics.fmean(of_all("completion_tokens"))}
    return row


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each of our trainers over each other one in the same mode: speed, parts of a step, share of memory."""
    found = []
    done = [row for row in rows if row["status"] == "ok"]
    for ours, peer in itertools.product(done, done):
        if ours["trainer"] in OURS and peer["trainer"] not in OURS and ours["mode"] == peer["mode"]:
            memory = ours["peak_memory_gib"] and ours["peak_memory_gib"] / peer["peak_memory_gib"]
            one = {"trainer": ours["trainer"], "over": peer["trainer"], "mode": ours["mode"], "memory": memory}
            one["speed"] = peer["step_s"] / ours["step_s"]
            parts = (name for name in ("generation_s", "training_s") if name in ours)
            found.append({**one, **{name.removesuffix("_s"): peer[name] / ours[name] for name in parts}})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the JSON; return 0 if every trainer made all of its turns."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add("case", choices=list(DEFAULTS))
    add("--model", help=f"dpo: {', '.join(MODELS)} or tiny; grpo: a Transformers folder with a chat template")
    add("--layers", type=int, help="dpo: this many layers instead of the model's own")
    add("--data", type=Path, help="grpo: folder of train.jsonl.gz: question, answer")
    add("--trainers", type=listed, help=f"of {', '.join(TRAINERS)}; comma between")
    add("--modes", type=listed, help=f"of {', '.join(MODES)}; comma between")
    add("--base", default="nf4", choices=["nf4", "bf16"])
    add("--pairs", type=int, default=4, help="dpo: a step")
    add("--length", type=int, default=1024, help="dpo: tokens of a sequence")
    add("--prompts", type=int, default=32, help="grpo: a step")
    add("--completions", type=int, default=8, help="grpo: a prompt")
    add("--new-tokens", type=int, default=256, help="grpo: of a completion, at most")
    add("--micro-batch", type=int, default=128, help="grpo: completions of a forward pass")
    add("--steps", type=int, help="of a turn, that count")
    add("--warm-up", type=int, help="steps of a turn before those that count")
    add("--rounds", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--time-limit", type=float, default=560.0, help="seconds for everything")
    add("--out", type=new_file, required=True)
    given = parser.parse_args(arguments)
    for name, value in DEFAULTS[given.case].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.case == "dpo":
        given.model = given.model or "mistral-7b"
    elif given.model is None or given.data is None:
        parser.error("grpo: --model and --data are needed")
    else:
        from benchmarks.quality.generated_answers import check_ends
        from lsr_scale.errors import UserError

        try:
            check_ends(given.model)
        except UserError as error:
            parser.error(str(error))
    for name, known in (("trainers", TRAINERS), ("modes", MODES)):
        if wrong := set(getattr(given, name)) - set(known):
            parser.error(f"--{name}: expected {', '.join(known)}, got {', '.join(sorted(wrong))}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preference-") as scratch:
        config = settings_of(given, Path(scratch))
        rows: list[dict[str, Any]] = []

        def keep(turns: Turns, broken: Broken) -> None:
            rows.clear()
            for mode, name in itertools.product(given.modes, given.trainers):
                key = name, mode
                if key in broken or key in turns:
                    rows.append({"trainer": name, "mode": mode, **(broken.get(key) or row_of(config, turns[key]))})
            write(given, config, rows, arguments or sys.argv[1:])

        measure_all(given, config, keep)
    for row in rows:
        peak = "" if row.get("peak_memory_gib") is None else f", {row['peak_memory_gib']:.2f} GiB"
        said = f"{row['step_s']:.3f} s a step{peak}" if row["status"] == "ok" else last_line(row)
        say(f"{row['trainer']} {row['mode']}: {row['status']} {said}")
    for one in ratios(rows):
        say(json.dumps(one))
    return int(any(row["status"] != "ok" for row in rows))


def write(given: Any, config: dict[str, Any], rows: list[dict[str, Any]], words: list[str]) -> None:
    """Write the result; where the model and the data lie is this machine's affair."""
    from benchmarks.speed.measurement import environment
    from lsr_scale import files

    paths = {str(path): Path(path).name for path in (given.model, given.data) if path is not None}
    kept = {key: value for key, value in vars(given).items() if key not in ("out", "model", "data")}
    kept["model"] = Path(given.model).name
    content = {
        "env": environment(files.environment()),
        "command": recorded("speed.preference", [paths.get(word, word) for word in words], given.out),
        "config": {**kept, "batch": config["batch"], "accumulation": config["accumulation"]},
        "rows": rows,
        "ratios": ratios(rows),
    }
    files.write_json(given.out, content)


if __name__ == "__main__":
    sys.exit(main())
