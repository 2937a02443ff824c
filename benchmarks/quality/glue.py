"""GLUE in LSR-Adapt's setting: query and value of a small encoder, LSR-Adapt, LoRA, KronA and KAdaptation beside it.

    python -m benchmarks.quality.glue --data DATA --work WORK --model MODEL --dry-run    what would be run
    python -m benchmarks.quality.glue --data DATA --work WORK --model MODEL --jobs 4 --time-limit 540
    python -m benchmarks.quality.glue --table

MODEL is a folder or a hub name: MPNet-base has the modules of 768 x 768 of the paper. MiniLM-L6 with `--rows` and
`--epochs` is the pilot on a CPU: few steps, so its figures compare methods, not this library with a paper.

Protocol. A tenth of each train part is held out by the hash of its first sentence; the learning rate, with alpha for
LSR, is chosen there: five points a method, one seed that nothing else uses. The validation part, labelled for every
task, is scored once a seed: accuracy, for STS-B Pearson's correlation. The new head trains at the same rate, or stays
as it was drawn (`--head frozen`, as the released LSR-Adapt code has it); it is never counted among the adapter's
parameters. A run is the library's `build_trainer` on an ordinary configuration; with `--together` runs that train both
adapter and head are trials of sweeps (`sweeps.py`), one after the other on one loading of the encoder.
"""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ALL_RESULTS
from benchmarks.quality import sweeps, trials
from benchmarks.quality.commonsense_data import held_out
from benchmarks.quality.trials import Provider, Trial, lsr_points, rates
from lsr_scale import files
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import read_metrics

RESULTS = ALL_RESULTS / "glue"
FROZEN_RESULTS = RESULTS / "frozen"
RATES = rates(2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
HIGH_RATES = rates(8e-3, 1.6e-2, 1e-3, 2e-3, 4e-3)  # for those that were best at the end of the others' rates
PROVIDERS = {
    "lora_8": Provider("lora", {"rank": 8, "alpha": 16.0}, RATES),
    "lora_2": Provider("lora", {"rank": 2, "alpha": 4.0}, RATES),
    "lsr_4": Provider("lsr", {"rank": 4, "separation_rank": 16}, lsr_points(4)),
    "krona": Provider("krona", {}, HIGH_RATES),
    "kadaptation": Provider("kadaptation", {}, HIGH_RATES),
    "lsr_4_paper_init": Provider("lsr", {"rank": 4, "separation_rank": 16, "init": "paper"}, RATES),
    "head_only": Provider(None, {}, RATES),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE: outputs of its classifier, 1 for a score, and how often its train part is seen."""

    num_labels: int
    epochs: int


TASKS = {"mrpc": Task(2, 8), "rte": Task(2, 10), "stsb": Task(1, 5), "sst2": Task(2, 2)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share."""

    work: Path
    model: str
    targets: tuple[str, ...]
    head: str = "trained"
    batch: int = 32
    rows: int | None = None
    dev_rows: int | None = None
    epochs: int | None = None
    max_steps: int = -1
    dtype: str = "float32"


def prepare(data: Path, work: Path, tasks: list[str]) -> dict[str, dict[str, int]]:
    """Write `work/data/<task>/{train,dev,test}.jsonl` and return the rows of each part."""
    from lsr_scale.data.sources import load_rows

    described: dict[str, dict[str, int]] = {}
    for task in tasks:
        train = load_rows(str(data / task), split="train").rows
        test = load_rows(str(data / task), split="validation").rows
        away = [held_out(task, {"question": row["sentence1"]}, 10) for row in train]
        parts = {
            "train": [row for row, out in zip(train, away, strict=True) if not out],
            "dev": [row for row, out in zip(train, away, strict=True) if out],
            "test": test,
        }
        for part, rows in parts.items():
            columns = [{key: row[key] for key in ("sentence1", "sentence2", "label")} for row in rows]
            if TASKS[task].num_labels == 1:
                columns = [{**row, "label": float(row["label"])} for row in columns]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in columns)
            files.write_text(work / "data" / task / f"{part}.jsonl", text)
        described[task] = {part: len(rows) for part, rows in parts.items()}
    return described


def config_of(setting: Setting, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Return a run's configuration."""
    provider, task = PROVIDERS[trial.provider], TASKS[trial.task]
    chosen = {key: value for key, value in point.items() if key != "learning_rate"}
    method = provider.method or "lora"
    adapter = {"method": method, "target_modules": list(setting.targets), **provider.options, **chosen}
    source = {"path": str(setting.work / "data" / trial.task)}
    part = {"split": "dev", "limit": setting.dev_rows} if trial.tunes else {"split": "test"}
    return {
        "model": {
            "name": setting.model,
            "task": "seq_cls",
            "num_labels": task.num_labels,
            "quantization": "none",
            "dtype": setting.dtype,
        },
        "adapter": adapter,
        "data": {
            "train": [{**source, "split": "train", "limit": setting.rows}],
            "validation": [{**source, **part}],
        },
        "training": {
            "output_dir": str(setting.work / "runs" / trial.name),
            "seed": trial.seed,
            "num_train_epochs": setting.epochs or task.epochs,
            "max_steps": setting.max_steps,
            "per_device_train_batch_size": setting.batch,
            "per_device_eval_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "learning_rate": point["learning_rate"],
            "warmup_steps": 0.06,
            "max_length": 128,
            "eval_strategy": "no",
            "save_strategy": "no",
            "memory": "speed",
        },
        "deepspeed": {"config": None},
    }


def score_of(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return accuracy, or for one output Pearson's correlation; None for what is not finite."""
    if not np.isfinite(predictions).all():
        return None
    if predictions.ndim == 1 or predictions.shape[-1] == 1:
        flat = predictions.reshape(-1)
        # a constant prediction correlates with nothing
        return float(np.corrcoef(flat, labels)[0, 1]) if flat.std() > 0 else 0.0
    return float((predictions.argmax(-1) == labels).mean())


def measure(setting: Setting, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Train once and return the score with what it depends on."""
    from peft.utils import ModulesToSaveWrapper

    from lsr_scale.config import run_from_dict
    from lsr_scale.run.folder import RunFolder
    from lsr_scale.training.assembly import build_trainer

    provider = PROVIDERS[trial.provider]
    config = config_of(setting, trial, point)
    run = run_from_dict(config, trial.name)
    folder = RunFolder(Path(config["training"]["output_dir"]))
    trainer: Any = build_trainer(run, folder)
    heads = [module for module in trainer.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    head = {id(parameter) for module in heads for parameter in module.parameters()}
    for parameter in trainer.model.parameters():
        if id(parameter) in head and setting.head == "frozen":
            parameter.requires_grad_(False)
        if id(parameter) not in head and provider.method is None:
            parameter.requires_grad_(False)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    num_adapter = sum(parameter.numel() for parameter in trained if id(parameter) not in head)
    try:
        outcome = trainer.train()
        output = trainer.predict(trainer.eval_dataset)
        score, loss, steps = score_of(output.predictions, output.label_ids), outcome.training_loss, outcome.global_step
    except ValueError as error:
        if "finite" not in str(error):
            raise
        score, loss, steps = None, None, trainer.state.global_step  # the library stops such a run
    shutil.rmtree(folder.path, ignore_errors=True)
    found = {
        "score": score,
        "steps": steps,
        "train_rows": len(trainer.train_dataset),
        "scored_rows": len(trainer.eval_dataset),
        "final_loss": loss if loss is not None and math.isfinite(loss) else None,
        "adapter_parameters": num_adapter,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
    }
    return _result(setting, trial, point, found)


def _metric(trial: Trial) -> str:
    return "pearson" if TASKS[trial.task].num_labels == 1 else "accuracy"


def _result(setting: Setting, trial: Trial, point: dict[str, float], found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found out about a trial with what it depends on."""
    anywhere = dataclasses.replace(setting, work=Path("WORK"), model="MODEL")
    told = {"part": "dev" if trial.tunes else "test", "metric": _metric(trial), "head": setting.head}
    return {**told, **found, "config": config_of(anywhere, trial, point)}


def measure_together(
    setting: Setting, together: sweeps.Together, group: list[tuple[Trial, dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Train trials as those of sweeps, one for each kind of head; return by name what `measure` returns.

    Trials that leave the head, or the encoder, as it is are none of a sweep: they are trained by themselves.
    """
    results = {}
    swept: dict[int, list[tuple[Trial, dict[str, float]]]] = {}
    for trial, point in group:
        if setting.head == "frozen" or PROVIDERS[trial.provider].method is None:
            results[trial.name] = measure(setting, trial, point)
        else:
            swept.setdefault(TASKS[trial.task].num_labels, []).append((trial, point))
    for alike in swept.values():
        configs = {
            trial.name: {**config_of(setting, trial, point), "eval": {"before": False}} for trial, point in alike
        }
        trained = sweeps.train_together(configs, setting.work, together)
        for trial, point in alike:
            folder, error = trained[trial.name]
            if error is None or "finite" in error:
                found = _found(folder, trial, configs[trial.name]) if error is None else _DIVERGED
                results[trial.name] = _result(setting, trial, point, found)
                shutil.rmtree(folder.path, ignore_errors=True)
    return results


_DIVERGED: dict[str, Any] = {"score": None, "final_loss": None, "adapter_parameters": None}


def _found(folder: RunFolder, trial: Trial, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a finished run's folder tells."""
    from lsr_scale.config import run_from_dict
    from lsr_scale.planning import plan

    results = json.loads(folder.results.read_text(encoding="utf-8"))
    scores = results["classification"]["validation"]["after"]
    logged = [(row["step"], row["loss"]) for row in read_metrics(folder.metrics) if "loss" in row]
    # each is the mean since the one before
    parts = [(step - before) * loss for (before, _), (step, loss) in itertools.pairwise([(0, 0.0), *logged])]
    return {
        "score": scores[_metric(trial)],
        "steps": results["steps"],
        "train_rows": results["train_rows"],
        "scored_rows": scores["num_examples"],
        "final_loss": sum(parts) / logged[-1][0],
        "adapter_parameters": plan(run_from_dict(config), trace=False).adapter_parameters,
        "trainable_parameters": results["trainable_parameters"],
    }


def describe(runs: list[Trial], rows: dict[str, dict[str, int]], setting: Setting, results: Path, jobs: int) -> str:
    """Return the plan in numbers: runs, steps, and minutes by the seconds a step of the finished runs."""
    done = trials.load(results)
    lines, total = [], 0.0
    for task in dict.fromkeys(trial.task for trial in runs):
        left = [trial for trial in runs if trial.task == task and trial.name not in done]
        seen = min(rows[task]["train"], setting.rows or rows[task]["train"])
        steps = math.ceil(seen / setting.batch) * (setting.epochs or TASKS[task].epochs)
        measured = [result["wall_s"] / result["steps"] for result in done.values() if result["task"] == task]
        time = "no run has been timed"
        if measured:
            minutes = len(left) * steps * statistics.median(measured) / jobs / 60
            total += minutes
            time = f"{minutes:.0f} minutes with {jobs} at a time"
        lines.append(
            f"{task}: {len(left)} of {len([t for t in runs if t.task == task])} runs left, {steps} steps, {time}"
        )
    return "\n".join([*lines, f"{total:.0f} minutes in all, of what was timed"])


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that have no result yet; return the exit status."""
    parser = trials.options(__doc__, RESULTS)
    add = parser.add_argument
    add("--model", help="folder or hub name")
    add("--targets", nargs="+", default=["q", "v"], help="q v of MPNet; query value of BERT and RoBERTa")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    add("--head", choices=["trained", "frozen"], default="trained")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--rows", type=int, help="train on the first so many")
    add("--dev-rows", type=int, help="tune on the first so many of those held out")
    add("--epochs", type=int, help="in place of each task's own")
    add("--batch", type=int, default=32)
    sweeps.add_option(parser)
    given = parser.parse_args(arguments)
    if given.table:
        print("\n".join(trials.table(trials.load(given.results), PROVIDERS)))
        return 0
    trials.check_options(parser, given, RESULTS)
    if given.model is None:
        parser.error("--model is needed: a folder or hub name")
    same = {name: getattr(given, name) for name in ("head", "batch", "rows", "dev_rows", "epochs", "dtype")}
    setting = Setting(given.work.resolve(), given.model, tuple(given.targets), **same)
    if given.smoke:
        setting = dataclasses.replace(setting, rows=64, dev_rows=64, epochs=1, max_steps=2)
    rows = prepare(given.data, setting.work, given.tasks)
    runs = trials.plan(given.tasks, given.providers, given.seeds)
    if given.dry_run:
        print(describe(runs, rows, setting, given.results, given.jobs))
        return 0
    files.write_json(given.results / "environment.json", {**files.environment(), "rows": rows})
    one: trials.Measure = functools.partial(measure, setting)
    several = None if given.together is None else functools.partial(measure_together, setting, given.together)
    return int(trials.execute(runs, PROVIDERS, one, given.results, given.jobs, given.time_limit, several) > 0)


if __name__ == "__main__":
    sys.exit(main())
