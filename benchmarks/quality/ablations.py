"""What each option of LSR-Adapt does: one option varied at a time on SmolLM2, every setting tuned over five rates.

    python -m benchmarks.quality.ablations --data DATA --work WORK --dry-run
    python -m benchmarks.quality.ablations --data DATA --work WORK --jobs 6 --time-limit 540      on a GPU
    python -m benchmarks.quality.ablations --table

Axes: the separation rank at rank 16 (`terms`), the rank at equal parameters (`rank`), balanced against skewed splits,
at equal terms and at about equal parameters (`split`), how the rank is shared (`left_rank`), the start (`init`),
trained term weights (`weights`), and alpha / rank against alpha / sqrt(rank) (`scaling`). LoRA stands beside.

Protocol. ARC-E, ARC-C and OpenBookQA train parts less a tenth by the hash of the question (the parts of
`commonsense.py`). A rate is chosen by one epoch with a seed of its own; three seeds then train two epochs. All scores
are of the tenth: defaults are chosen here, so no test row is read. A setting that several axes share is run once. With
`--together` runs are trials of sweeps (`sweeps.py`), the same ones.
"""

import functools
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import ALL_RESULTS
from benchmarks.models import LINEARS, SMOLLM2
from benchmarks.quality import commonsense_data, sweeps, trials
from benchmarks.quality.trials import Provider, Trial, rates
from lsr_scale import files
from lsr_scale.adapters import METHODS
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder

RESULTS = ALL_RESULTS / "ablations"
TASKS = commonsense_data.REGIMES["small"].tasks
EPOCHS = 2
RATES = rates(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
PAPER_RATES = rates(1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # of the paper's start, whose scaling is 2,048 times the default's
CONDITIONS = ("condition_down_max", "condition_up_max")
SMOLLM2_SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))


def _lsr(rank: int, terms: int, **options: Any) -> Provider:
    points = PAPER_RATES if options.get("init") == "paper" else RATES
    alpha = {} if "alpha" in options or options.get("init") == "paper" else {"alpha": 2.0 * rank}
    return Provider("lsr", {"rank": rank, "separation_rank": terms, **alpha, **options}, points)


BASE = "r16_s16"
PROVIDERS: dict[str, Provider] = {
    BASE: _lsr(16, 16),
    **{f"r16_s{terms}": _lsr(16, terms) for terms in (1, 2, 4, 8, 32, 48)},
    # a term has as many parameters as the square root of a square rank says
    **{f"r{rank}_s{terms}": _lsr(rank, terms) for rank, terms in ((1, 64), (4, 32), (64, 8))},
    "skewed": _lsr(16, 16, left_in=8, left_out=8),
    "skewed_equal": _lsr(16, 8, left_in=8, left_out=8),
    **{f"left_rank_{left}": _lsr(16, 16, left_rank=left) for left in (1, 2, 8, 16)},
    "paper_init": _lsr(16, 16, init="paper"),
    "weights": _lsr(16, 16, term_weights=True),
    "r4_s16": _lsr(4, 16),
    "r64_s16": _lsr(64, 16),
    # with the scaling of rank 16, which is 2, in the middle
    **{f"sqrt_r{rank}_s16": _lsr(rank, 16, alpha=8.0, use_rslora=True) for rank in (4, 64)},
    "lora_2": Provider("lora", {"rank": 2, "alpha": 4.0}, RATES),
    "lora_8": Provider("lora", {"rank": 8, "alpha": 16.0}, RATES),
}
AXES: dict[str, tuple[str, ...]] = {
    "terms": (*(f"r16_s{terms}" for terms in (1, 2, 4, 8, 16, 32, 48)), "lora_2", "lora_8"),
    "rank": ("r1_s64", "r4_s32", BASE, "r64_s8"),
    "split": (BASE, "skewed", "skewed_equal"),
    "left_rank": (BASE, *(f"left_rank_{left}" for left in (1, 2, 8, 16))),
    "init": (BASE, "paper_init"),
    "weights": (BASE, "weights"),
    "scaling": ("r4_s16", BASE, "r64_s16", "sqrt_r4_s16", "sqrt_r64_s16"),
}


def oversized(provider: Provider, shapes: tuple[tuple[int, int], ...] = SMOLLM2_SHAPES) -> list[tuple[int, int]]:
    """Return the shapes of layers where a side of the update has more parameters than its dense form."""
    if provider.method not in METHODS:
        return []
    method = METHODS[provider.method]
    config = method.config_class(**provider.options)
    return [shape for shape in shapes if method.oversized_sides(*shape, config)]


def config_of(work: Path, model: str, smoke: bool, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Return a run's configuration."""
    provider = PROVIDERS[trial.provider]
    data = work / "data"
    training = {
        "output_dir": str(work / "runs" / trial.name),
        "seed": trial.seed,
        "num_train_epochs": 1 if trial.tunes else EPOCHS,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": point["learning_rate"],
        "max_length": None,
        "padding_free": True,
        "memory": "speed",
        "save_strategy": "no",
    }
    return {
        "model": {"name": model, "quantization": "none", "dtype": "bfloat16"},
        "adapter": {"method": provider.method, "target_modules": LINEARS, **provider.options},
        "data": {
            "train": [{"path": str(data / task), "split": "train", **({"limit": 8} if smoke else {})} for task in TASKS]
        },
        "training": training | ({"max_steps": 2, "logging_steps": 1} if smoke else {}),
        "deepspeed": {"config": None},
        "eval": {
            "tasks": [{"path": str(data / task), "split": "dev"} for task in TASKS],
            "before": False,
            "batch_tokens": 32768,
            **({"limit": 4} if smoke else {}),
        },
    }


def measure(work: Path, model: str, smoke: bool, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Train once and return the mean accuracy of the development parts."""
    from lsr_scale.config import run_from_dict
    from lsr_scale.run.train import train

    config = config_of(work, model, smoke, trial, point)
    try:
        folder = train(run_from_dict(config, trial.name), trial.name, overwrite=True, quiet=True)
    except UserError as error:
        if "finite" not in str(error):
            raise
        return _diverged(str(error))
    return _result(folder, config_of(Path("WORK"), model, smoke, trial, point), trial, smoke)


def measure_together(
    work: Path, model: str, smoke: bool, together: sweeps.Together, group: list[tuple[Trial, dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Train trials as those of a sweep; return by name what `measure` returns, of those that did not fail."""
    configs = {trial.name: config_of(work, model, smoke, trial, point) for trial, point in group}
    trained, results = sweeps.train_together(configs, work, together), {}
    for trial, point in group:
        folder, error = trained[trial.name]
        if error is not None and "finite" in error:
            results[trial.name] = _diverged(error)
        elif error is None:
            results[trial.name] = _result(folder, config_of(Path("WORK"), model, smoke, trial, point), trial, smoke)
    return results


def _diverged(reason: str) -> dict[str, Any]:
    return {"score": None, "accuracy": {}, "adapter_parameters": None, "reason": reason[:200]}


def _result(folder: RunFolder, config: dict[str, Any], trial: Trial, smoke: bool) -> dict[str, Any]:
    """Return a finished run's result; its folder is removed."""
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    accuracy = {task: scores["after"]["accuracy"] for task, scores in results["accuracy"].items()}
    shutil.rmtree(folder.path, ignore_errors=True)
    return {
        "part": "dev",
        "score": statistics.fmean(accuracy.values()),
        "accuracy": accuracy,
        "steps": results["steps"],
        "final_loss": results.get("final_loss"),
        **{name: results[name] for name in CONDITIONS if name in results},
        "adapter_parameters": results["trainable_parameters"],
        "oversized": [list(shape) for shape in oversized(PROVIDERS[trial.provider])],
        "config": config,
        "env": files.environment(),
        **({"smoke": True} if smoke else {}),
    }


def describe(runs: list[Trial], results: Path) -> str:
    """Return what is to be run."""
    done = trials.load(results)
    settings = {trial.provider for trial in runs}
    lines = [f"{axis}: {', '.join(name for name in names if name in settings)}" for axis, names in AXES.items()]
    too_large = [name for name in settings if oversized(PROVIDERS[name])]
    lines.append(f"larger than dense somewhere: {', '.join(sorted(too_large)) or 'none'}")
    left = sum(trial.name not in done for trial in runs)
    times = [result["wall_s"] for result in done.values()]
    seconds = f"{left * statistics.median(times) / 60:.0f} minutes one at a time" if times else "no run has been timed"
    return "\n".join([*lines, f"{left} of {len(runs)} runs left, {seconds}"])


def tables(results: Path) -> list[str]:
    """Return Markdown: a table an axis, of what has been run."""
    done = trials.load(results)
    if any(result.get("smoke") for result in done.values()):
        raise ValueError(f"{results}: holds results of a trial of the program, which measure nothing")
    lines: list[str] = []
    for axis, names in AXES.items():
        rows = trials.table(done, names, {"small": "accuracy, %"})
        for name in names:
            if oversized(PROVIDERS[name]):
                rows = [row.replace(f"| {name} |", f"| {name}, larger than dense |") for row in rows]
        lines += [f"**{axis}**", "", *rows, ""]
    return lines + conditions(done)


def conditions(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return Markdown: the largest condition number that a side of any module had in a run, over the seeds."""
    lines = ["**largest condition number of a run**", "", "| | down | up |", "|---|---:|---:|"]
    for name in PROVIDERS:
        rows = [r for r in done.values() if r["provider"] == name and r["seed"] != trials.TUNING_SEED]
        sides = [[r[key] for r in rows if key in r] for key in CONDITIONS]
        if all(sides):
            lines.append(f"| {name} | {' | '.join(f'{max(side):.2f}' for side in sides)} |")
    return lines if len(lines) > 4 else []


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that have no result yet; return the exit status."""
    parser = trials.options(__doc__, RESULTS)
    add = parser.add_argument
    add("--model", default=SMOLLM2)
    add("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    sweeps.add_option(parser)
    given = parser.parse_args(arguments)
    if given.table:
        print("\n".join(tables(given.results)))
        return 0
    names = dict.fromkeys(name for axis in given.axes for name in AXES[axis])
    runs = trials.plan(["small"], names, given.seeds)
    if given.dry_run:
        print(describe(runs, given.results))
        return 0
    trials.check_options(parser, given, RESULTS)
    work = given.work.resolve()
    commonsense_data.prepare(given.data, work)
    one: trials.Measure = functools.partial(measure, work, given.model, given.smoke)
    several = None
    if given.together is not None:
        several = functools.partial(measure_together, work, given.model, given.smoke, given.together)
    return int(trials.execute(runs, PROVIDERS, one, given.results, given.jobs, given.time_limit, several) > 0)


if __name__ == "__main__":
    sys.exit(main())
