"""How fast are several trials that share a base and their steps, beside the same runs one by one, and side by side?

    python -m benchmarks.speed.sweep --model smollm2-135m --base none --trials 8 --tokens 4096 --seq-len 512 \
        --out benchmarks/results/sweep/NAME.json
    python -m benchmarks.speed.sweep --run smollm2_lsr --set training.max_steps=8 --trials 4 --device cpu --out FILE

Three ways to train `--trials` runs that differ in their learning rate:

    together     `lsr-scale sweep`, all of them in one step (`--together`), a process a GPU (`--gpus`)
    one_by_one   `lsr-scale train` for each, one after the other
    side_by_side `lsr-scale train` for each, all processes at once on the same device

Each is timed from the start of its first process to the end of its last (`seconds`, with all that a user waits for:
imports, loading, tokenizing, saving; of `one_by_one` only `--one-by-one` runs are done, and the time is theirs times
trials over runs), and without start-up (`tokens_per_s`): by the tokens/s that runs log, the median over logging steps
after the first two, of `together` the sum of those that train at a time. Processes side by side do not begin their
steps at one moment, so their rate is that of other ones with `--beside-steps` steps, over the time in which all of them
are under way. `gib` is the most device memory in use at any time, all processes and their contexts; `cpu_s` the
processor's seconds of all, which other load disturbs less than `seconds`. The runs are LSR-Adapt r=16 s=16 on random
weights of a model's shapes, rows of one length and packed, or those of `--run` and `--set`.
"""

import argparse
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import MODELS, model_values
from benchmarks.speed.trainer_overhead import PER_SPEED, run_of, write_model, write_rows
from benchmarks.speed.workers import say

WAYS = ("together", "one_by_one", "side_by_side")
RATES = (1e-4, 2e-3)  # of the first and of the last trial


def rates(number: int) -> list[float]:
    """Return the trials' learning rates."""
    first, last = RATES
    return [first * (last / first) ** (index / max(1, number - 1)) for index in range(number)]


def base_run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the runs have in common, as a YAML file has it."""
    if args.run:
        from lsr_scale.config import dump_yaml, load_run
        from lsr_scale.config.shipped import find_run

        return yaml.safe_load(dump_yaml(load_run(find_run(args.run), args.set)))
    write_model(folder, model_values(args.model, args.layers))
    write_rows(folder / "rows.jsonl", args.tokens // args.seq_len * args.steps, args.seq_len)
    return run_of(folder, args, "speed", "base")


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the most GiB of the device that were in use until now, by `nvidia-smi`."""
    if device != "cuda":
        yield lambda: None
        return
    most = [0.0]
    # one process that goes on: each that starts makes the driver wait
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=500"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:

        def watch() -> None:
            for line in process.stdout or ():
                most[0] = max(most[0], float(line) if line.strip().isdigit() else 0.0)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: most[0] / 1024
        finally:
            process.terminate()
            thread.join()


def processor_seconds() -> float:
    """Return the processor's seconds of the processes that have ended, with what they started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(
    folder: Path, name: str, command: str, run: dict[str, Any], words: Sequence[str] = ("--quiet",)
) -> subprocess.Popen[str]:
    """Start a command of this package on a run."""
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
    log = (folder / f"{name}.log").open("w", encoding="utf-8")
    call = [sys.executable, "-m", "lsr_scale", command, str(config), "--overwrite", *words]
    return subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], folder: Path, name: str, end: float) -> None:
    """Wait for a command; end it, and the program, where it fails or is not done in time."""
    try:
        status = process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        status = "no end in time"
    if status:
        text = (folder / f"{name}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"{name}: {status}\n{text[-3000:]}")


def logged_speed(run_folder: Path) -> float:
    """Return a run's tokens/s: the median of what it logged after its first steps."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    speeds = [row["tokens_per_s"] for row in map(json.loads, text.splitlines()) if "tokens_per_s" in row]
    if len(speeds) < PER_SPEED:
        raise RuntimeError(f"{run_folder}: {len(speeds)} logging steps are too few; raise --steps")
    return statistics.median(speeds[PER_SPEED - 1 :])


def together(folder: Path, base: dict[str, Any], args: argparse.Namespace, end: float) -> tuple[list[float], list[str]]:
    """Do the sweep; return each trial's tokens/s, and the notes that it printed."""
    output = folder / "together"
    run = {**base, "training": {**base["training"], "output_dir": str(output)}}
    run["sweep"] = {"grid": {"training.learning_rate": rates(args.trials)}, "together": args.together or args.trials}
    words = ["--gpus", str(args.gpus)] if args.gpus else []
    finish(start(folder, "together", "sweep", run, words), folder, "together", end)
    said = (folder / "together.log").read_text(encoding="utf-8")
    sys.stdout.write(said[-1500:])
    speeds = [logged_speed(path) for path in sorted((output / "trials").iterdir()) if path.is_dir()]
    return speeds, [line.removeprefix("note: ") for line in said.splitlines() if line.startswith("note: ")]


def at_a_time(args: argparse.Namespace, notes: Sequence[str]) -> int:
    """Return how many trials of a sweep train at a time: as asked for, or as the sweep chose and said."""
    if args.together != "auto":
        return min(args.trials, (args.together or args.trials) * max(1, args.gpus))
    chosen = [int(found[1]) for note in notes if (found := re.match(r"(\d+) trials share a step", note))]
    others = max(1, args.gpus) - len(chosen)  # processes whose trials are trained one after the other
    return min(args.trials, sum(chosen) + max(0, others))


def alone(folder: Path, base: dict[str, Any], args: argparse.Namespace, end: float, at_once: bool) -> list[float]:
    """Do the runs by themselves, one after the other or all at once; return each one's tokens/s."""
    running, speeds = [], []
    wanted = rates(args.trials) if at_once else rates(args.trials)[: args.one_by_one or args.trials]
    for index, rate in enumerate(wanted):
        name = f"{'beside' if at_once else 'alone'}-{index}"
        training = {**base["training"], "learning_rate": rate, "output_dir": str(folder / name)}
        running.append((name, start(folder, name, "train", {**base, "training": training})))
        if not at_once:
            finish(running[-1][1], folder, name, end)
            say(f"{name}: {logged_speed(folder / name):,.0f} tokens/s")
    for name, process in running:
        finish(process, folder, name, end)
        speeds.append(logged_speed(folder / name))
    return speeds


def rate_of_all(folder: Path, base: dict[str, Any], args: argparse.Namespace, end: float) -> float | None:
    """Return the tokens/s of all runs at once while all of them are under way; None where they never are.

    They are ended when the first one is done.
    """
    running = []
    for index, rate in enumerate(rates(args.trials)):
        training = {**base["training"], "learning_rate": rate, "output_dir": str(folder / f"rate-{index}")}
        training |= {"max_steps": args.beside_steps}
        running.append(start(folder, f"rate-{index}", "train", {**base, "training": training}))
    seen: list[tuple[float, list[int]]] = []
    try:
        while all(process.poll() is None for process in running):
            if time.monotonic() > end:
                raise RuntimeError("side_by_side: no end in time")
            seen.append((time.monotonic(), [logged_steps(folder / f"rate-{i}") for i in range(args.trials)]))
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return common_rate(seen, args.logging_steps * PER_SPEED, args.tokens)


def logged_steps(run_folder: Path) -> int:
    """Return the last step that a run has logged, 0 before the first."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [json.loads(line).get("step", 0) for line in lines if line.endswith("}")]
    return max(steps, default=0)


def common_rate(seen: Sequence[tuple[float, Sequence[int]]], first: int, tokens: int) -> float | None:
    """Return the tokens/s of all runs from when each had logged so many steps; None where that never was.

    Args:
        seen: Times, and each run's last logged step then.
        first: The step.
        tokens: Of a step.
    """
    inside = [(moment, sum(steps)) for moment, steps in seen if min(steps) >= first]
    if len(inside) < 2 or inside[-1][1] == inside[0][1]:
        return None
    # between changes of what is logged: a moment in between says nothing of the steps since
    changes = [inside[0], *(now for before, now in itertools.pairwise(inside) if now[1] != before[1])]
    (began, done), (ended, all_done) = changes[1 if len(changes) > 2 else 0], changes[-1]
    return (all_done - done) * tokens / (ended - began)


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return how many times as fast the trials together are as each other way."""
    mine = rows.get("together")
    ratios: dict[str, float] = {}
    for way in WAYS[1:]:
        if mine and way in rows:
            if rows[way]["tokens_per_s"]:
                ratios[f"steps_over_{way}"] = mine["tokens_per_s"] / rows[way]["tokens_per_s"]
            ratios[f"all_over_{way}"] = rows[way]["seconds"] / mine["seconds"]
            ratios[f"cpu_of_{way}"] = mine["cpu_s"] / rows[way]["cpu_s"]
            if mine["gib"]:
                ratios[f"memory_of_{way}"] = mine["gib"] / rows[way]["gib"]
    return ratios


def main(arguments: list[str] | None = None) -> int:
    """Measure each way once and write the result after each."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="none", choices=["nf4", "int8", "none"])
    add("--run", help="a YAML file or the name of a shipped one, instead of --model")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of --run")
    add("--trials", type=int, default=8)
    add(
        *("--together",),
        type=lambda text: text if text == "auto" else int(text),
        help="how many share a step, or auto; all by default",
    )
    add("--gpus", type=int, default=0, help="of the sweep: a process each; by default this one alone")
    add("--one-by-one", type=int, help="do only so many of the runs that follow each other")
    add("--tokens", type=int, default=4096, help="tokens a step and trial")
    add("--seq-len", type=int, default=512)
    add("--steps", type=int, default=60)
    add("--beside-steps", type=int, default=600, help="of the processes whose rate is taken; 0 takes none")
    add("--logging-steps", type=int, default=10, help="as runs have it by default")
    add("--ways", type=lambda text: text.split(","), default=list(WAYS), help="which, joined by commas")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--time-limit", type=float, default=1800.0, help="seconds for all; a way that it cuts short is left out")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    from lsr_scale import files

    end = time.monotonic() + args.time_limit
    config = {name: value for name, value in vars(args).items() if name not in ("out", "time_limit")}
    config["command"] = recorded("speed.sweep", arguments or sys.argv[1:], args.out)
    rows: dict[str, dict[str, Any]] = {}
    ways: dict[str, Callable[..., list[float]]] = {
        "one_by_one": lambda *given: alone(*given, at_once=False),
        "side_by_side": lambda *given: alone(*given, at_once=True),
    }
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        folder = Path(name)
        base = base_run(folder, args)
        for way in args.ways:
            began, cpu = time.monotonic(), processor_seconds()
            notes: list[str] = []
            with peak_memory(args.device) as peak:
                try:
                    if way == "together":
                        speeds, notes = together(folder, base, args, end)
                    else:
                        speeds = ways[way](folder, base, args, end)
                except RuntimeError as error:
                    say(f"{way}: {error}")
                    continue
                seconds = time.monotonic() - began
                seconds *= args.trials / len(speeds)
                cpu_s = (processor_seconds() - cpu) * args.trials / len(speeds)
                figures: dict[str, Any] = {"by_run": speeds, "seconds": seconds, "cpu_s": cpu_s, "gib": peak()}
            # runs one after the other are as fast as one of them
            number = at_a_time(args, notes) if way == "together" else 1 if way == "one_by_one" else args.trials
            total: float | None = statistics.fmean(speeds) * number
            figures |= {"at_a_time": number, "notes": notes} if way == "together" else {}
            if way == "side_by_side":
                total = rate_of_all(folder, base, args, end) if args.beside_steps else None
            rows[way] = {"tokens_per_s": total, **figures}
            say(f"{way}: {json.dumps({key: value for key, value in rows[way].items() if key != 'by_run'})}")
            result = {"env": files.environment(), "config": config, "rows": rows, "ratios": summary(rows)}
            files.write_json(args.out, result)
    say(json.dumps(summary(rows)))
    return 0 if len(rows) == len(args.ways) else 1


if __name__ == "__main__":
    sys.exit(main())
