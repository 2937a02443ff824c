"""Does a real model train in every way? Its loss over one epoch: padded or packed, fused or not, NF4 or bf16.

    python -m benchmarks.robustness.real_model_curves --model FOLDER --data DATA \\
        --out benchmarks/results/real_model/NAME.json

For LSR-Adapt and LoRA, 16 runs of the ordinary command (`lsr-scale train`), `--at-once` of them side by side on one
GPU, on the train parts of ARC-E, ARC-C and OpenBookQA (DATA: a folder of <task>/train.jsonl.gz, or files of rows). A
real model has large logits, which random weights have not: kernels that overflow on them are seen here alone. What is
to be seen: every curve is finite to its end, and those that differ in how they compute lie on each other.

Padded batches have 32 rows, packed ones two of 512 tokens, which is about as many tokens.
"""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.command_line import new_file, script_parser
from benchmarks.models import LINEARS, SMOLLM2
from benchmarks.pool import Job, do_all
from benchmarks.quality.commonsense_data import JOINT
from lsr_scale import files
from lsr_scale.config import dump_yaml, run_from_dict

TASKS = JOINT[:3]
MAX_LENGTH = 512
ROWS = {"padded": 32, "packed": 2}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lsr": ({"method": "lsr", "rank": 4, "separation_rank": 16}, 4e-3),
    "lora": ({"method": "lora", "rank": 8, "alpha": 16.0}, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """One of the ways to train."""

    method: str
    base: str
    batches: str
    fused: str

    @property
    def name(self) -> str:
        """The stem of its files, and its row in the table."""
        return "-".join((self.method, self.base, self.batches, "fused" if self.fused == "auto" else "unfused"))


WAYS = [Way(*values) for values in itertools.product(METHODS, ("nf4", "bf16"), ROWS, ("auto", "off"))]


def sources(data: Iterable[Path]) -> list[dict[str, str]]:
    """Return what is trained on as a run's file has it: the tasks of a folder, or files as they are."""
    train_sources: list[dict[str, str]] = []
    for path in data:
        folders = [path / task for task in TASKS]
        if all(folder.is_dir() for folder in folders):
            train_sources += [{"path": str(folder.resolve()), "split": "train"} for folder in folders]
        else:
            train_sources.append({"path": str(path.resolve())})
    return train_sources


def config_of(way: Way, model: str, data: list[dict[str, str]], work: Path, steps: int | None) -> dict[str, Any]:
    """Return a run as its YAML file has it."""
    options, rate = METHODS[way.method]
    return {
        "model": {"name": model, "quantization": "none" if way.base == "bf16" else way.base, "dtype": "bfloat16"},
        "adapter": {"target_modules": LINEARS, **options},
        "data": {"train": data},
        "training": {
            "output_dir": str(work / "runs" / way.name),
            "seed": 0,
            "num_train_epochs": 1,
            "max_steps": -1 if steps is None else steps,
            "per_device_train_batch_size": ROWS[way.batches],
            "gradient_accumulation_steps": 1,
            "learning_rate": rate,
            "max_length": MAX_LENGTH,
            "packing": way.batches == "packed",
            "fused": way.fused,
            "memory": "speed",
            "save_strategy": "no",
            "logging_steps": 1,
        },
        "eval": {"tasks": []},
    }


def curve_of(metrics: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every step that was logged, whatever it is."""
    if not metrics.is_file():
        return []
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], float(row["loss"])) for row in rows if row.get("loss") is not None and "step" in row]


def train(model: str, data: list[dict[str, str]], work: Path, steps: int | None, way: Way) -> dict[str, Any]:
    """Do a run as the command would, and return its curve; in a worker."""
    from lsr_scale.cli import main as command

    began = time.monotonic()
    values = config_of(way, model, data, work, steps)
    shutil.rmtree(values["training"]["output_dir"], ignore_errors=True)
    file = work / "configs" / f"{way.name}.yaml"
    files.write_text(file, dump_yaml(run_from_dict(values, way.name)))
    status = command(["train", str(file), "--overwrite"])
    curve = curve_of(work / "runs" / way.name / "metrics.jsonl")
    return {
        **dataclasses.asdict(way),
        "name": way.name,
        "exit_status": status,
        "finite": not status and bool(curve) and all(math.isfinite(loss) for _, loss in curve),
        "wall_s": round(time.monotonic() - began, 1),
        "curve": curve,
        "config": config_of(
            way, "MODEL", [{**source, "path": Path(source["path"]).name} for source in data], Path("WORK"), steps
        ),
    }


def ends(curve: list[tuple[int, float]], number: int = 20) -> tuple[float, float]:
    """Return the mean loss of the first and of the last steps; NaN for no steps."""
    losses = [loss for _, loss in curve]
    if not losses:
        return math.nan, math.nan
    return statistics.fmean(losses[:number]), statistics.fmean(losses[-number:])


def table(results: list[dict[str, Any]]) -> str:
    """Return the runs as text, a line each."""
    lines = [f"{'run':<30} {'steps':>5} {'first':>7} {'last':>7} {'finite':>6} {'status':>6} {'s':>6}"]
    for result in results:
        first, last = ends(result["curve"])
        finite = "yes" if result["finite"] else "NO"
        lines.append(
            f"{result['name']:<30} {len(result['curve']):5d} {first:7.3f} {last:7.3f} {finite:>6} "
            f"{result['exit_status']!s:>6} {result['wall_s']:6.0f}"
        )
    finite = sum(result["finite"] for result in results)
    return "\n".join(
        [*lines, f"{finite} of {len(results)} runs finite to their end (first and last: means of 20 steps)"]
    )


def plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the curves, smoothed, a panel for each method and way of batching."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors, styles = {"nf4": "C0", "bf16": "C1"}, {"auto": "-", "off": "--"}
    figure, axes = pyplot.subplots(len(METHODS), len(ROWS), figsize=(10, 7), sharex="col", sharey=True, squeeze=False)
    for (row, method), (column, batches) in itertools.product(enumerate(METHODS), enumerate(ROWS)):
        axis = axes[row][column]
        for result in results:
            if (result["method"], result["batches"]) != (method, batches):
                continue
            steps, losses = zip(*result["curve"], strict=True) if result["curve"] else ((), ())
            smooth = [statistics.fmean(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)]
            label = f"{result['base']}, {'fused' if result['fused'] == 'auto' else 'unfused'}"
            label += "" if result["finite"] else " (NOT FINITE)"
            axis.plot(steps, smooth, styles[result["fused"]], color=colors[result["base"]], label=label, linewidth=1.2)
        axis.text(0.12, 0.93, f"{method}, {batches}", transform=axis.transAxes, va="top", weight="bold", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("step" if row else "")
        axis.set_ylabel("" if column else "loss, nats per token (mean of 10 steps)")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def title_of(content: dict[str, Any]) -> str:
    """Return the plot's title: the model, the data, and the card."""
    gpus = content["env"]["gpus"]
    card = f", {gpus[0].removeprefix('NVIDIA ')}" if gpus else ""
    model = content["config"]["model"].removeprefix("builtin:")
    return f"{model}, one epoch of {', '.join(TASKS)}{card}"


def main(arguments: list[str] | None = None) -> int:
    """Do the runs, write the JSON and the picture, print the table; return 0 if all curves are finite."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="folder, or builtin: name")
    add("--data", type=Path, nargs="+", required=True, help="folder of <task>/train.jsonl.gz, or files of rows")
    add("--out", type=new_file, required=True, help="the JSON; a PNG goes beside it")
    add("--work", type=Path, help="for configs, run folders and logs; by default they are removed")
    add("--at-once", type=int, default=4, help="runs side by side")
    add("--time-limit", type=float, default=float("inf"), help="seconds after which running jobs are stopped")
    add("--steps", type=int, help="instead of an epoch: is it wired up?")
    add("--only", default="", help="ways whose names contain this")
    given = parser.parse_args(arguments)
    waiting = [way for way in WAYS if given.only in way.name]
    order = [way.name for way in waiting]
    done: dict[str, dict[str, Any]] = {}
    began = time.monotonic()

    def next_job() -> Job | None:
        return Job(waiting[0].name, (waiting.pop(0),)) if waiting else None

    def take(job: Job, result: dict[str, Any]) -> None:
        done[job.name] = result
        first, last = ends(result["curve"])
        print(f"{job.name}: {first:.3f} -> {last:.3f} in {result['wall_s']:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        work = (given.work or Path(scratch)).resolve()
        call = functools.partial(train, str(given.model), sources(given.data), work, given.steps)
        failed, ended = do_all(next_job, call, take, given.at_once, given.time_limit, work / "logs")
        for log in [] if given.work else sorted((work / "logs").glob("*.log")):
            if not done.get(log.stem, {"finite": False})["finite"]:  # the folder goes, so its end is shown
                print(
                    f"--- {log.stem}\n"
                    + "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                )
    results = [done[name] for name in order if name in done]
    config = {"model": Path(given.model).name, "steps": given.steps, "at_once": given.at_once}
    content = {"env": files.environment(), "config": config, "wall_s": round(time.monotonic() - began, 1)}
    files.write_json(given.out, {**content, "runs": results})
    plot(results, given.out.with_suffix(".png"), title_of({**content, "config": config}))
    print(table(results))
    left = len(waiting) + len(ended) + failed
    if left:
        print(f"{left} runs left, {failed} of them failed")
    return int(bool(left) or not all(result["finite"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
