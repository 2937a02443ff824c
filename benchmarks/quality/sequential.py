"""How much of a first task is left after an adapter was trained on a second one: LSR-Adapt, Kron-LoRA and LoRA.

    python -m benchmarks.quality.sequential --data DATA --work WORK --jobs 10
    python -m benchmarks.quality.sequential --table

One run is `lsr-scale train` on the first task and another, with `adapter.start_from`, on the second; both tasks' tests
are scored after each. Model, parts of the data and adapters are those of `commonsense.py`; each adapter's rate (and
alpha) is the one chosen there on the development set, for 128 rows a step, and halved for the 32 of here; neither that
nor the epochs were tuned. Kron-LoRA's paper has 55.18 % left of ARC-C after ARC-E, against 53.17 for LoRA r=8, on
another model.
"""

import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import ALL_RESULTS
from benchmarks.models import SMOLLM2
from benchmarks.quality import commonsense, commonsense_data, commonsense_methods, trials
from benchmarks.quality.commonsense import Run, Setting, best_point, config_of
from benchmarks.quality.commonsense_methods import LABELS
from benchmarks.quality.trials import Provider, Trial
from lsr_scale import files

RESULTS = ALL_RESULTS / "sequential"
PAIRS = {"arc_challenge-arc_easy": 4, "arc_easy-hellaswag": 2}  # epochs of each task
NAMES = ("lora_8", "lsr_4", "lora_2", "kron_lora", "lsr_16")
BATCH, SLOWER = 32, 0.5


def providers() -> dict[str, Provider]:
    """Return the rows with the one point that `commonsense.py` chose for each.

    Raises:
        SystemExit: if it chose none.
    """
    chosen, done = {}, trials.load(commonsense.RESULTS)
    for name in NAMES:
        known = commonsense_methods.PROVIDERS[name]
        index = best_point(Run("joint", "bf16", name, 0, None), done)
        if index is None:
            raise SystemExit(
                f"{commonsense.RESULTS} has no tuning of {name}; run python -m benchmarks.quality.commonsense first"
            )
        point = dict(known.points[index])
        chosen[name] = dataclasses.replace(known, points=({**point, "learning_rate": SLOWER * point["learning_rate"]},))
    return chosen


def config(trial: Trial, point: dict[str, float], setting: Setting, second: bool) -> dict[str, Any]:
    """Return the run of a trial's first or second task, both tests scored where it is the second."""
    pair, work = trial.task.split("-"), setting.work
    made = config_of(Run("joint", "bf16", trial.provider, trial.seed, None), point, setting)
    folder = work / "runs" / trial.name
    made["adapter"]["start_from"] = str(folder / "first") if second else None
    made["data"]["train"] = [{"path": str(work / "data" / pair[second]), "split": "train"}]
    if setting.smoke:
        made["data"]["train"][0] |= commonsense.SMOKE["source"]
    made["training"] |= {
        "output_dir": str(folder / ("second" if second else "first")),
        "num_train_epochs": PAIRS[trial.task],
        "per_device_train_batch_size": BATCH,
    }
    made["eval"]["tasks"] = [{"path": str(work / "data" / task), "split": "test"} for task in pair]
    made["eval"]["before"] = not second and trial.seed == 0 and trial.provider == NAMES[0]
    return made


def accuracies(folder: Path, pair: list[str], when: str) -> dict[str, float] | None:
    """Return a run's accuracies by task, or None where that moment was not scored."""
    scores = {}
    for task in pair:
        file = folder / "eval" / f"{task}-{when}.jsonl"
        if not file.is_file():
            return None
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        scores[task] = statistics.fmean(row["choice"] == row["answer"] for row in rows)
    return scores


def measure(setting: Setting, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Train on both tasks and return the accuracies after each; `score` is what is left of the first."""
    from lsr_scale.config import run_from_dict
    from lsr_scale.run.train import train

    pair = trial.task.split("-")
    result: dict[str, Any] = {}
    for second in (False, True):
        run = run_from_dict(config(trial, point, setting, second), trial.name)
        folder = train(run, overwrite=True, quiet=True).path
        result["after_second" if second else "after_first"] = accuracies(folder, pair, "after")
        if (before := accuracies(folder, pair, "before")) is not None:
            result["zero_shot"] = before
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        result["adapter_parameters"] = results["trainable_parameters"]
    shown = dataclasses.replace(setting, work=Path("WORK"))
    return {
        "score": result["after_second"][pair[0]],
        **result,
        "configs": [config(trial, point, shown, second) for second in (False, True)],
        **({"smoke": True} if setting.smoke else {}),
    }


def table(results: Path) -> str:
    """Return the Markdown table of a folder of results, in %: mean and standard deviation over the seeds."""
    done = trials.load(results)
    head = ["", "parameters", "seeds", "first task, before the second", "after it", "change", "second task"]
    parts = []
    for pair in PAIRS:
        first, second = pair.split("-")
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        rows = [result for result in done.values() if result["task"] == pair]
        zero = next((row["zero_shot"] for row in rows if "zero_shot" in row), None)
        if zero:
            cells = [f"{100 * zero[task]:.1f}" for task in (first, second)]
            lines.append(f"| zero-shot | 0 |  | {cells[0]} |  |  | {cells[1]} |")
        for name in NAMES:
            seeds = [row for row in rows if row["provider"] == name]
            if seeds:
                before, after = ([row[w][first] for row in seeds] for w in ("after_first", "after_second"))
                changes = [b - a for a, b in zip(before, after, strict=True)]
                cells = [
                    _spread(before),
                    _spread(after),
                    _spread(changes, "+"),
                    _spread([r["after_second"][second] for r in seeds]),
                ]
                count = f"{seeds[0]['adapter_parameters']:,}"
                lines.append(f"| {LABELS[name]} | {count} | {len(seeds)} | " + " | ".join(cells) + " |")
        if rows:
            parts.append("\n".join([f"{first}, then {second}:", "", *lines]))
    return "\n\n".join(parts)


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.1f}{deviation}"


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that have no result yet, or print the table; return the exit status."""
    parser = trials.options(__doc__, RESULTS)
    add = parser.add_argument
    add("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    add("--providers", nargs="+", default=list(NAMES), choices=list(NAMES))
    add("--model", default=SMOLLM2)
    given = parser.parse_args(arguments)
    if given.table:
        print(table(given.results))
        return 0
    trials.check_options(parser, given, RESULTS)
    setting = Setting(given.work.resolve(), given.model, given.smoke)
    seeds = range(given.seeds)
    todo = [Trial(pair, name, seed, 0) for pair in given.pairs for seed in seeds for name in given.providers]
    if given.dry_run:
        print("\n".join(trial.name for trial in todo))
        return 0
    data = commonsense_data.prepare(given.data, setting.work)
    files.write_json(given.results / "environment.json", {**files.environment(), "data": data})
    work = functools.partial(measure, setting)
    return int(trials.execute(todo, providers(), work, given.results, given.jobs, given.time_limit) > 0)


if __name__ == "__main__":
    sys.exit(main())
