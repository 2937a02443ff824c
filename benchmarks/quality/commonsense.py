"""Accuracy of LoRA, LSR-Adapt, Kron-LoRA and their relatives on commonsense questions, with seeds and error bars.

    python -m benchmarks.quality.commonsense --data DATA --work WORK --dry-run       what would be run, and how long
    python -m benchmarks.quality.commonsense --data DATA --work WORK --jobs 6 --time-limit 480
    python -m benchmarks.report.commonsense_tables                                  the tables, from the results alone

A run is `lsr-scale train` with a config in WORK, by one of `--jobs` workers: processes that import once and do run
after run. It adds a line to `trials.jsonl` in the results when it has ended: one that was killed is simply done
again, a finished one never. At the time limit running jobs are stopped. (`nvidia-cuda-mps-control -d` before it lets
the processes' kernels run side by side on one GPU.) With `--together auto` the runs are trials of sweeps instead, in
one process: all whose settings are known, the tuning first; each is the run that it would be by itself.

Protocol. A tenth of each train part is held out by the hash of its question (of the sentence pair for WinoGrande), and
the learning rate, with alpha for LSR, is chosen there: six points for every method, one epoch, one seed that no other
run uses. The test part (the labelled validation part where the test has no labels) is scored once for each seed, on
the sum of log-likelihoods. HellaSwag has no train part here, so a fifth of its validation questions, by their first
sentence, is its test; BoolQ is without passages. Neither is comparable with published figures.
Questions that stand in the test part with the same answer (the sources repeat a few) are left out of the other parts.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import ALL_RESULTS
from benchmarks.command_line import script_parser
from benchmarks.models import LINEARS, SMOLLM2
from benchmarks.pool import Job, do_all
from benchmarks.quality import sweeps, trials
from benchmarks.quality.commonsense_data import REGIMES, prepare
from benchmarks.quality.commonsense_methods import PROVIDERS
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale import files
from lsr_scale.config import dump_yaml, run_from_dict

RESULTS = ALL_RESULTS / "commonsense"
Results = Mapping[str, dict[str, Any]]  # of finished runs, by name
SMOKE: dict[str, dict[str, Any]] = {"training": {"max_steps": 2}, "eval": {"limit": 8}, "source": {"limit": 16}}
ROUNDED, SEEDS_ROUNDED = (8, 4), 3  # the headline's first seeds are scored with rounded factors as well
BATCH = 128  # rows a step, about 4,500 tokens: with much fewer a small model waits for the host


STAGES = ["headline", "quantized", *(name + end for name in list(REGIMES)[1:] for end in ("", ":all"))]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: all that its result depends on besides the data. `point` is None until it is chosen."""

    regime: str
    base: str
    provider: str
    seed: int
    point: int | None

    @property
    def tunes(self) -> bool:
        """Whether it is scored on the development set."""
        return self.seed == TUNING_SEED

    @property
    def name(self) -> str:
        """The stem of its files."""
        end = f"tune{self.point}" if self.tunes else f"seed{self.seed}"
        return f"{self.regime}-{self.base}-{self.provider}-{end}"


def plan(stages: Iterable[str], providers: Iterable[str], seeds: int) -> list[Run]:
    """Return the runs of some stages, in an order of which every prefix is of use.

    A provider is tuned and gets its first seed before the next one; further seeds go round.

    Args:
        stages: `headline`, `quantized` (NF4 and int8, three methods, three seeds, tuned on bf16), and any regime but
            joint, in which LoRA-8 and LoRA-2 are tuned and compared over three seeds; all `providers` with `:all`
            after its name, which is worth while where those two separate.
        providers: Which rows of the headline.
        seeds: Of the headline; 0 only tunes.
    """
    runs: list[Run] = []

    def compare(regime: str, names: Iterable[str], number: int) -> None:
        names = list(names)
        for name in names:
            runs.extend(Run(regime, "bf16", name, TUNING_SEED, i) for i in range(len(PROVIDERS[name].points)))
            runs.extend(Run(regime, "bf16", name, seed, None) for seed in range(min(number, 1)))
        runs.extend(Run(regime, "bf16", name, seed, None) for seed in range(1, number) for name in names)

    for stage in stages:
        if stage == "headline":
            compare("joint", providers, seeds)
        elif stage == "quantized":
            runs += [
                Run("joint", base, name, seed, None)
                for seed in range(3)
                for base in ("nf4", "int8")
                for name in ("lora_8", "lsr_4", "kron_lora")
            ]
        else:
            regime, _, which = stage.partition(":")
            compare(regime, providers if which == "all" else ("lora_8", "lora_2"), 3)
    return list(dict.fromkeys(runs))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share: where their files are, the model, and whether they are trials that measure nothing."""

    work: Path
    model: str = SMOLLM2
    smoke: bool = False


def config_of(run: Run, point: dict[str, float], setting: Setting) -> dict[str, Any]:
    """Return the run as its YAML file has it."""
    work = setting.work
    provider, regime = PROVIDERS[run.provider], REGIMES[run.regime]
    chosen, point = dict(provider.options), dict(point)
    rate = point.pop("learning_rate")
    sources = [{"path": str(work / "data" / task), "split": "train"} for task in regime.tasks]
    part = "dev" if run.tunes else "test"
    config = {
        "model": {
            "name": setting.model,
            "quantization": "none" if run.base == "bf16" else run.base,
            "dtype": "bfloat16",
        },
        "adapter": {"method": provider.method, "target_modules": LINEARS, **chosen, **point},
        "data": {"train": sources},
        "training": {
            "output_dir": str(work / "runs" / run.name),
            "seed": run.seed,
            "num_train_epochs": 1 if run.tunes else regime.epochs,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "learning_rate": rate,
            "max_length": None,  # rows are short; TRL cuts none without padding
            "padding_free": True,
            "memory": "speed",
            "save_strategy": "no",
            "logging_steps": 20,
        },
        "eval": {
            "tasks": [{"path": str(work / "data" / task), "split": part} for task in regime.tasks],
            # zero-shot is measured once a base and regime, by the first run of the plan
            "before": run.provider == "lora_8" and run.seed == 0,
            "batch_tokens": 32768,
        },
    }
    if setting.smoke:
        config["training"] |= SMOKE["training"]
        config["eval"] |= SMOKE["eval"]
        for source in sources:
            source.update(SMOKE["source"])
    return config


def result_of(
    run: Run, point: dict[str, float], setting: Setting, data: dict[str, Any], wall_s: float, folder: Path | None = None
) -> dict[str, Any]:
    """Return what a finished run leaves: figures, settings, hashes, and which examples were right, by task."""
    folder = folder or setting.work / "runs" / run.name
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tasks: dict[str, Any] = {}
    for task in REGIMES[run.regime].tasks:
        for when in ("before", "after"):
            file = folder / "eval" / f"{task}-{when}.jsonl"
            if file.is_file():
                rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                right = "".join(str(int(row["choice"] == row["answer"])) for row in rows)
                ids = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()
                accuracy = right.count("1") / len(right)
                tasks.setdefault(task, {})[when] = {"accuracy": accuracy, "ids_sha256": ids, "right": right}
    hashes = {task: data[task] for task in REGIMES[run.regime].tasks}
    rounded = folder / "rounded.json"
    copied = ("trainable_parameters", "steps", "final_loss", "tokens", "tokens_per_s", "peak_memory_gib", "training_s")
    copied += ("condition_down_max", "condition_up_max")
    return {
        **dataclasses.asdict(run),
        "part": "dev" if run.tunes else "test",
        "settings": point,
        **{key: results[key] for key in copied if key in results},
        "wall_s": round(wall_s, 1),
        "command": f"lsr-scale train configs/{run.name}.yaml",
        "config": config_of(run, point, dataclasses.replace(setting, work=Path("WORK"))),
        "tasks": tasks,
        **({"rounded": json.loads(rounded.read_text(encoding="utf-8"))} if rounded.is_file() else {}),
        "data": hashes,
        "env": files.environment(),
        **({"smoke": True} if setting.smoke else {}),
    }


def mean_accuracy(result: dict[str, Any], when: str = "after", bits: str | None = None) -> float:
    """Return the mean over tasks of a result's accuracies, in percent; with factors rounded to so many bits."""
    if bits is not None:
        return 100 * statistics.fmean(task["accuracy"] for task in result["rounded"][bits]["tasks"].values())
    return 100 * statistics.fmean(task[when]["accuracy"] for task in result["tasks"].values())


def best_point(run: Run, done: Results) -> int | None:
    """Return the point with the best mean on the development set, or None while one of its runs is missing.

    Quantized bases take the point of bf16.
    """
    means = []
    for index, point in enumerate(PROVIDERS[run.provider].points):
        result = finished(Run(run.regime, "bf16", run.provider, TUNING_SEED, index), point, done)
        if result is None:
            return None
        means.append(mean_accuracy(result))
    return means.index(max(means))


def finished(run: Run, point: dict[str, float], done: Results) -> dict[str, Any] | None:
    """Return a run's result, or None if there is none of these settings."""
    result = done.get(run.name)
    return result if result is not None and result["settings"] == point else None


def train_and_score(setting: Setting, data: dict[str, Any], run: Run, point: dict[str, float]) -> dict[str, Any]:
    """Do a run as the command would, score rounded factors where they are wanted, return the result; in a worker."""
    from benchmarks.quality.rounded_adapters import score_rounded
    from lsr_scale.cli import main as command

    began, work = time.monotonic(), setting.work
    folder = work / "runs" / run.name
    shutil.rmtree(folder, ignore_errors=True)
    config = work / "configs" / f"{run.name}.yaml"
    files.write_text(config, dump_yaml(run_from_dict(config_of(run, point, setting), run.name)))
    if status := command(["train", str(config), "--overwrite"]):
        raise RuntimeError(f"the command's exit status is {status}")
    if _is_rounded(run):
        files.write_json(folder / "rounded.json", score_rounded(folder, ROUNDED))
    return result_of(run, point, setting, data, time.monotonic() - began)


def _is_rounded(run: Run) -> bool:
    """Tell whether a run is scored with rounded factors as well."""
    return run.regime == "joint" and run.base == "bf16" and run.seed < SEEDS_ROUNDED


def train_and_score_together(
    setting: Setting, data: dict[str, Any], together: sweeps.Together, group: list[tuple[Run, dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Do runs as the trials of a sweep; return by name what `train_and_score` returns, of those that finished."""
    from benchmarks.quality.rounded_adapters import score_rounded

    began = time.monotonic()
    configs = {run.name: config_of(run, point, setting) for run, point in group}
    trained = sweeps.train_together(configs, setting.work, together)
    finished = [(run, point) for run, point in group if trained[run.name][1] is None]
    for run, _ in finished:
        files.write_text(
            setting.work / "configs" / f"{run.name}.yaml", dump_yaml(run_from_dict(configs[run.name], run.name))
        )
        folder = trained[run.name][0].path
        if _is_rounded(run):
            files.write_json(folder / "rounded.json", score_rounded(folder, ROUNDED))
    seconds = (time.monotonic() - began) / max(1, len(finished))  # each one's part of all
    return {
        run.name: {
            **result_of(run, point, setting, data, seconds, trained[run.name][0].path),
            "sweep": {"together": together, "trials": len(group)},
        }
        for run, point in finished
    }


def _startable(waiting: list[Run], done: Results) -> Iterator[tuple[Run, dict[str, float]]]:
    """Yield the runs whose settings are known; those whose result is there, of the same settings, leave `waiting`."""
    for run in list(waiting):
        index = run.point if run.tunes else best_point(run, done)
        if index is None:
            continue
        point = PROVIDERS[run.provider].points[index]
        if finished(run, point, done) is not None:
            waiting.remove(run)
        else:
            yield run, point


def execute(
    runs: list[Run],
    data: dict[str, Any],
    setting: Setting,
    results: Path,
    jobs: int,
    time_limit: float,
    together: sweeps.Together | None = None,
) -> int:
    """Do the runs that have no result yet, so many at a time, or as sweeps; return how many failed."""
    waiting, done = list(runs), trials.load(results)
    for _ in _startable(waiting, done):  # what is done leaves
        pass

    def next_job() -> Job | None:
        ready = next(_startable(waiting, done), None)
        if ready is None:
            return None
        waiting.remove(ready[0])
        return Job(ready[0].name, ready)

    def take(job: Job, result: dict[str, Any]) -> None:
        done[job.name] = result
        trials.add(results, job.name, result)
        print(f"{job.name}: {mean_accuracy(result):.2f} % in {result['wall_s']:.0f} s", flush=True)

    def next_group() -> Job | None:
        ready = list(_startable(waiting, done))
        group = [one for one in ready if one[0].base == ready[0][0].base]  # a sweep has one base
        for run, _ in group:
            waiting.remove(run)
        return Job(f"{len(group)} runs from {group[0][0].name}", (group,)) if group else None

    def take_all(job: Job, found: dict[str, dict[str, Any]]) -> None:
        for run, _ in job.arguments[0]:
            if run.name in found:
                take(Job(run.name, ()), found[run.name])
            else:
                lost.append(run.name)
                print(f"{run.name}: failed, see {setting.work / 'logs'}", flush=True)

    lost: list[str] = []
    logs = setting.work / "logs"
    if together is None:
        call: Any = functools.partial(train_and_score, setting, data)
        failed, ended = do_all(next_job, call, take, jobs, time_limit, logs)
        left = len(ended)
    else:
        call = functools.partial(train_and_score_together, setting, data, together)
        failed, ended = do_all(next_group, call, take_all, 1, time_limit, logs)
        left = sum(len(job.arguments[0]) for job in ended)
    print(f"{len(waiting) + left} runs left, {failed + len(lost)} failed")
    return failed + len(lost)


ASSUMED_STEP_S, ASSUMED_START_S = 0.06, 15.0
CHARACTERS_PER_TOKEN = 4.3  # JSON's keys and the wrong choices included: an upper bound on tokens


def describe(runs: list[Run], data: dict[str, Any], results: Path, jobs: int) -> str:
    """Return the plan in numbers: runs, steps, tokens at most, minutes from finished runs or, without any, assumed."""
    lines, total_s = [], 0.0
    done = trials.load(results)
    per_step = [result["training_s"] / result["steps"] for result in done.values() if result.get("steps")]
    step_s = statistics.median(per_step) if per_step else ASSUMED_STEP_S
    rest = [result["wall_s"] - result["training_s"] for result in done.values() if "training_s" in result]
    start_s = statistics.median(rest) if rest else ASSUMED_START_S
    for regime, base, tunes in dict.fromkeys((run.regime, run.base, run.tunes) for run in runs):
        left = [run for run in runs if (run.regime, run.base, run.tunes) == (regime, base, tunes)]
        left = [run for run in left if run.name not in done]
        tasks, epochs = REGIMES[regime].tasks, 1 if tunes else REGIMES[regime].epochs
        steps = epochs * sum(data[task]["train"]["rows"] for task in tasks) // BATCH
        tokens = epochs * sum(data[task]["train"]["characters"] for task in tasks) / CHARACTERS_PER_TOKEN
        seconds = len(left) * (steps * step_s + start_s) / jobs
        total_s += seconds
        what = "tuning" if tunes else "seeds"
        lines.append(
            f"{regime:>11} {base:>5} {what:>6}: {len(left):3d} runs of {steps:5,d} steps, {tokens / 1e6:.1f}M tokens "
            f"at most, {seconds / 60:5.1f} minutes with {jobs} at a time"
        )
    source = f"the median of {len(per_step)} finished runs" if per_step else "assumed: nothing was measured yet"
    lines.append(
        f"{total_s / 60:.0f} minutes in all, at {step_s:.3f} s a step and {start_s:.0f} s around it ({source})"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that have no result yet; return the exit status."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of <task>/<split>.jsonl.gz")
    add("--work", type=Path, required=True, help="for the parts, configs, run folders and logs")
    add("--results", type=Path, default=RESULTS)
    add("--stages", nargs="+", default=["headline"], choices=STAGES)
    add("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    add("--seeds", type=int, default=5)
    add("--model", default=SMOLLM2)
    add("--jobs", type=int, default=4, help="processes at a time on one GPU")
    add("--time-limit", type=float, default=float("inf"), help="seconds after which running jobs are stopped")
    add("--dry-run", action="store_true", help="print the plan in numbers")
    sweeps.add_option(parser)
    add("--smoke", action="store_true", help="16 rows a task, two steps, 8 questions: is it wired up?")
    given = parser.parse_args(arguments)
    if given.smoke and given.results == RESULTS:
        parser.error("--smoke: its results are no measurements; give another folder with --results")
    work = given.work.resolve()
    data = prepare(given.data, work)
    runs = plan(given.stages, given.providers, given.seeds)
    if given.dry_run:
        print(describe(runs, data, given.results, given.jobs))
        return 0
    setting = Setting(work, given.model, given.smoke)
    return int(
        execute(runs, data, setting, given.results, given.jobs, given.time_limit, given.together) > 0
    )  # what is left is no fault


if __name__ == "__main__":
    sys.exit(main())
