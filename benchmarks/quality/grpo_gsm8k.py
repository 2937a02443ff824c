"""How small may an adapter be for reinforcement? GRPO on GSM8K by adapters of 10 thousand to 4.4 million parameters.

    python -m benchmarks.quality.grpo_gsm8k --data GSM8K --work WORK --model qwen=FOLDER --jobs 4 --time-limit 560
    python -m benchmarks.report.grpo_tables                        the tables and the figure, from the results alone

GSM8K is a folder of `train.jsonl.gz` and `test.jsonl.gz` with `question` and `answer`, FOLDER a Transformers folder
with a chat template. A trial is a run as `lsr-scale train` does it, by one of `--jobs` processes side by side on one
device; it adds a line to `trials.jsonl` in the results when it has ended. At the time limit running ones are stopped:
as long as WORK is there, they go on from their last checkpoint, and otherwise they are done again.

Protocol. A step has 32 prompts: under GRPO with 8 completions each of at most 256 tokens, worth 1 where the answer is
exactly right, no KL; under SFT with their solutions, without the calculator's annotations. Both have the same questions
in the same steps, drawn by the seed. AdamW, 3 steps of warm-up, a rate that falls to zero. Every adapter of `grpo_rows`
is tuned alike, for GRPO and for SFT: three rates, as many steps as a seed has, a seed that no other trial uses; the
best has the highest mean reward (SFT: the lowest mean loss) over the last 5 steps, on questions that were not seen
before. Where it is the first or the last rate, the next one beyond it is tried, once. Then each seed is trained, and
answers the test questions greedily, loaded from disk onto the base.

A suite of before, `--tuning-steps 20 --steps 60 --schedule constant`, chose rates at which longer runs lost what they
had learned; its results stay.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ALL_RESULTS, gsm8k
from benchmarks.command_line import recorded, script_parser
from benchmarks.pool import Job, do_all
from benchmarks.quality import trials
from benchmarks.quality.frontier_rows import refused
from benchmarks.quality.generated_answers import check_ends, right_answers
from benchmarks.quality.grpo_rows import LAST, RATES, ROWS, TRAININGS
from benchmarks.quality.rate_trials import RateTrial, best_rate, packed_bits, rates_left, tried
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale import api, files
from lsr_scale.errors import UserError
from lsr_scale.model import Quantization, load_base, load_tokenizer
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import read_metrics

RESULTS = ALL_RESULTS / "grpo"
SCHEDULES = {"linear": "linear", "constant": "constant_with_warmup"}
MOST_BEYOND = 1  # rates tried beyond an end
CALCULATOR = re.compile(r"<<[^<>]*>>")
Results = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the trials of one call share: model, base, the size of a step and their number; where files are."""

    work: Path
    model: str  # what it is called
    folder: str  # the model's name or folder
    base: Quantization = "nf4"
    prompts: int = 32  # a step
    completions: int = 8  # a prompt
    new_tokens: int = 256
    micro_batch: int = 128  # completions of a forward pass
    tuning_steps: int = 40
    steps: int = 40
    schedule: str = "linear"
    test_batch: int = 660  # questions answered at a time
    limit: int | None = None  # of test questions: a trial of the program

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        names = ("model", "base", "prompts", "completions", "new_tokens", "tuning_steps", "steps", "schedule")
        return {"suite": self.prefix, **{name: getattr(self, name) for name in names}}

    @property
    def prefix(self) -> str:
        """The beginning of its trials' names."""
        size = f"{self.prompts}x{self.completions}x{self.new_tokens}"
        end = "" if self.schedule == "constant" else f"-{self.schedule}"
        return f"{self.model}-{self.base}-{size}-{self.tuning_steps}+{self.steps}{end}"

    def steps_of(self, trial: "Trial") -> int:
        """Return how many steps a trial is trained."""
        return self.tuning_steps if trial.tunes else self.steps


@dataclasses.dataclass(frozen=True)
class Trial(RateTrial):
    """One training: by GRPO or SFT, an adapter, a seed and a rate."""

    training: str
    row: str
    seed: int
    rate: float


def tuned_rates(suite: Suite, training: str, row: str, done: Results) -> dict[float, float]:
    """Return what each rate of a row that was tried lost."""
    start = f"{suite.prefix}-{training}-{row}-tune-"
    return tried(result for name, result in done.items() if name.startswith(start))


def next_trials(suite: Suite, trainings: Iterable[str], rows: Iterable[str], seeds: int, done: Results) -> list[Trial]:
    """Return the trials that can be done now: rates to be tried, and seeds at rates that were chosen.

    Every row is tuned and has its first seed before any has its second.
    """
    found = []
    for row in rows:
        for training in trainings:
            if not ROWS[row].takes(suite.base):
                continue
            tuned = tuned_rates(suite, training, row, done)
            if left := rates_left(RATES[training][row], tuned, MOST_BEYOND):
                found += [Trial(training, row, TUNING_SEED, rate) for rate in left]
            elif math.isfinite(tuned[best := best_rate(tuned)]):
                found += [Trial(training, row, seed, best) for seed in range(seeds)]
    found = [trial for trial in found if f"{suite.prefix}-{trial.name}" not in done]
    return sorted(found, key=lambda trial: 0 if trial.tunes else trial.seed)  # a stable order


def write_rows(data: Path, work: Path) -> dict[str, Any]:
    """Write the rows as runs take them, `work/{grpo,sft,test}.jsonl`; return number and hash of each.

    Rows of `grpo` and `sft` are of the same questions in the same order.
    """
    train = gsm8k.read(data, "train")
    solutions = [[{"role": "assistant", "content": CALCULATOR.sub("", row["answer"])}] for row in train]
    written = {
        "grpo": [gsm8k.judged(row) for row in train],
        "sft": [{"prompt": gsm8k.prompt(row), "completion": s} for row, s in zip(train, solutions, strict=True)],
        "test": [gsm8k.judged(row) for row in gsm8k.read(data, "test")],
    }
    described = {}
    for name, rows in written.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(work / f"{name}.jsonl", text)
        described[name] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return described


def drawn_rows(suite: Suite, trial: Trial) -> Path:
    """Write the rows of a trial in the order of its steps, the same questions for GRPO and SFT; return the file."""
    lines = gsm8k.lines_of(suite.work / f"{trial.training}.jsonl")
    order = np.random.default_rng(trial.seed).permutation(len(lines))[: suite.prompts * suite.steps_of(trial)]
    path = suite.work / "drawn" / f"{suite.prefix}-{trial.name}.jsonl"
    files.write_text(path, "".join(f"{lines[index]}\n" for index in order))
    return path


def run_of(suite: Suite, trial: Trial, rows: Path) -> dict[str, Any]:
    """Return a trial as a run's YAML file has it; `rows` are in the order of its steps."""
    completions = suite.prompts * suite.completions
    size = min(suite.micro_batch, completions)
    method = {
        "grpo": {
            "reward": ["exact_answer"],
            **{"beta": 0.0, "temperature": 1.0, "num_generations": suite.completions},
            "max_completion_length": suite.new_tokens,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": completions // size,
            "shuffle_dataset": False,
        },
        "sft": {
            "per_device_train_batch_size": suite.prompts,
            "gradient_accumulation_steps": 1,
            "train_sampling_strategy": "sequential",
        },
    }
    return {
        "model": {"name": suite.folder, "quantization": suite.base, "dtype": "bfloat16"},
        "adapter": ROWS[trial.row].section(),
        "data": {"train": [str(rows)]},
        "training": {
            **{"method": trial.training, "output_dir": str(suite.work / "runs" / f"{suite.prefix}-{trial.name}")},
            **{"seed": trial.seed, "learning_rate": trial.rate, "memory": "speed", "logging_steps": 1},
            **{"max_steps": suite.steps_of(trial)},
            **{"lr_scheduler_type": SCHEDULES[suite.schedule], "warmup_steps": 3},
            **{"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1},
            **method[trial.training],
        },
        "eval": {"tasks": []},
    }


def measure(suite: Suite, trial: Trial | None) -> dict[str, Any]:
    """Return the result of a trial, or of the base alone; run in a worker.

    Returns:
        Of a trial `score`, what rates are chosen by (None where it diverged), `curve` by step, and figures of the run.
        Of a seed, and the base, `accuracy` on the test questions, and `right` in their order.
    """
    if trial is None:
        tokenizer = load_tokenizer(suite.folder)
        base = load_base(suite.folder, quantization=suite.base, dtype="bfloat16").eval()
        return {"row": "base", **answers(suite, base, tokenizer)}
    began, row = time.monotonic(), ROWS[trial.row]
    about = {**dataclasses.asdict(trial), "method": row.method, "options": dict(row.options)}
    run = run_of(suite, trial, drawn_rows(suite, trial))
    folder = RunFolder(Path(run["training"]["output_dir"]))
    if not folder.results.is_file():  # else it was stopped while it answered
        try:
            api.train(run, resume="auto" if folder.path.is_dir() else None, quiet=True)
        except UserError as error:
            if "diverged" not in str(error):
                raise
            return {**about, "score": None, "error": str(error), "wall_s": round(time.monotonic() - began, 1)}
    trained = json.loads(folder.results.read_text(encoding="utf-8"))
    copied = ("trainable_parameters", "adapter_bytes", "training_s", "peak_memory_gib")
    result = {
        **about,
        "trained_steps": trained["steps"],
        **{key: trained[key] for key in copied if key in trained},
        **curve_of(trial.training, read_metrics(folder.metrics)),
    }
    if not trial.tunes:
        result |= answers(suite, *api.load_model(folder.path))
    return {**result, "wall_s": round(time.monotonic() - began, 1)}


def curve_of(training: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a run's metrics say: the curve by step, and the mean of its last steps, the higher the better."""
    steps = [row for row in rows if "loss" in row]
    names = {"reward": "reward", "tokens": "completions/mean_length", "cut": "completions/clipped_ratio"}
    names |= {"generation_s": "generation_s", "loss": "loss"}
    taken = {name: key for name, key in names.items() if all(key in row for row in steps)}
    curve = {name: [round(row[key], 5) for row in steps] for name, key in taken.items()}
    last = curve["reward" if training == "grpo" else "loss"][-LAST:]
    mean = statistics.fmean(last)
    return {"score": mean if training == "grpo" else -mean, "curve": {**curve, "s": [row["wall_s"] for row in steps]}}


def answers(suite: Suite, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return which of the test questions a model answers rightly, and how long that took."""
    lines = gsm8k.lines_of(suite.work / "test.jsonl")[: suite.limit]
    began = time.monotonic()
    right = right_answers(model, tokenizer, [json.loads(line) for line in lines], suite.test_batch, suite.new_tokens)
    seconds = round(time.monotonic() - began, 1)
    return {"accuracy": statistics.fmean(right), "right": packed_bits(np.array(right)), "test_s": seconds}


def execute(suite: Suite, given: Any, shared: Mapping[str, Any]) -> int:
    """Do what has no result yet, so many trials at a time; return how many are left of those that can be done."""
    done = trials.load(given.results)
    begun: set[str] = set()  # by this call: one that failed is not tried again

    def waiting() -> list[Trial | None]:
        found: list[Trial | None] = [*next_trials(suite, given.trainings, given.rows, given.seeds, done)]
        return [*([] if f"{suite.prefix}-base" in done else [None]), *found]

    def next_job() -> Job | None:
        for trial in waiting():
            name = f"{suite.prefix}-{'base' if trial is None else trial.name}"
            if name not in begun:
                begun.add(name)
                return Job(name, (trial,))
        return None

    def take(job: Job, result: dict[str, Any]) -> None:
        done[job.name] = {**suite.about, **result, **shared}
        trials.add(given.results, job.name, done[job.name])
        shown = {key: round(value, 4) for key in ("score", "accuracy") if (value := result.get(key)) is not None}
        print(f"{job.name}: {json.dumps(shown) if shown else 'diverged'}", flush=True)

    do_all(next_job, functools.partial(measure, suite), take, given.jobs, given.time_limit, suite.work / "logs")
    return len(waiting())


def main(arguments: list[str] | None = None) -> int:
    """Do the trials that have no result yet; return the exit status."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of train.jsonl.gz and test.jsonl.gz: question, answer")
    add("--work", type=Path, required=True, help="for the rows, runs and their checkpoints")
    add("--results", type=Path, default=RESULTS)
    add("--model", required=True, help="NAME=FOLDER, such as qwen=FOLDER")
    add("--base", default="nf4", choices=["nf4", "none", "int8"])
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    add("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    add("--seeds", type=int, default=2)
    for field in ("steps", "tuning_steps", "prompts", "completions", "new_tokens", "micro_batch", "test_batch"):
        add(f"--{field.replace('_', '-')}", type=int, default=getattr(Suite, field))
    add("--schedule", default=Suite.schedule, choices=list(SCHEDULES), help="of the rate, after its warm-up")
    add("--jobs", type=int, default=1, help="trials side by side on the device")
    add("--time-limit", type=float, default=math.inf, help="seconds after which running trials are stopped")
    add("--limit", type=int, help="only so many test questions: is it wired up? Such results are no measurements")
    given = parser.parse_args(arguments)
    model, has_folder, folder = given.model.partition("=")
    if not has_folder:
        parser.error(f"--model: expected NAME=FOLDER, got {given.model!r}")
    completions = given.prompts * given.completions
    if completions % min(given.micro_batch, completions):
        parser.error(f"--micro-batch: {given.micro_batch} does not divide a step's {completions} completions")
    if given.limit is not None and given.results == RESULTS:
        parser.error("--limit: its results are no measurements; give another folder with --results")
    if line := refused({row: ROWS[row] for row in given.rows}, given.base):
        print(line, flush=True)
        if not any(ROWS[row].takes(given.base) for row in given.rows):
            parser.error(f"--rows: none of them can be run: {line}")
    names = ("base", "prompts", "completions", "new_tokens", "micro_batch", "tuning_steps", "steps", "schedule")
    names += ("test_batch", "limit")
    folder = str(Path(folder).resolve()) if Path(folder).is_dir() else folder
    suite = Suite(given.work.resolve(), model, folder, **{name: getattr(given, name) for name in names})
    words = [word if not word.startswith(("/", "~", ".")) else Path(word).name for word in arguments or sys.argv[1:]]
    command = recorded("quality.grpo_gsm8k", [word.replace(given.model, f"{model}=FOLDER") for word in words])
    try:
        check_ends(folder)
    except UserError as error:
        parser.error(str(error))
    shared = {"data": write_rows(given.data, suite.work), "jobs": given.jobs, "command": command}
    left = execute(suite, given, {**shared, "env": files.environment()})
    print(f"{left} trials left, of those that can be done now" if left else "all trials are done")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
