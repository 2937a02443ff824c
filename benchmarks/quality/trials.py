"""Short runs compared fairly: each method tuned on equally many points, then trained with several seeds.

A trial adds a line to its suite's `trials.jsonl` when it has ended: one that was killed is done again, a finished one
never. Workers are processes that import once and do trial after trial. Used by `vision.py`, `glue.py`, `ablations.py`,
`sequential.py` and, for its results, `commonsense.py`.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import script_parser
from benchmarks.pool import Job, do_all

TUNING_SEED = 1000  # used by no other trial
FILE = "trials.jsonl"  # of a suite: a line a trial


@dataclasses.dataclass(frozen=True)
class Provider:
    """A row of a comparison: a method (None trains the head only), its options, and the points that are tried."""

    method: str | None
    options: Mapping[str, Any]
    points: tuple[dict[str, float], ...]


NUM_POINTS = 5


def tuned_alike(providers: Mapping[str, Provider], number: int = NUM_POINTS) -> Mapping[str, Provider]:
    """Return the rows of a comparison, or refuse an unfair one: each is to be tuned over `number` points."""
    for name, provider in providers.items():
        if len(provider.points) != number:
            raise ValueError(f"{name}: expected {number} points to tune over, as all have, got {len(provider.points)}")
    return providers


def rates(*learning_rates: float, **fixed: float) -> tuple[dict[str, float], ...]:
    """Return points that differ in their learning rate only."""
    return tuple({"learning_rate": rate, **fixed} for rate in learning_rates)


def lsr_points(rank: int) -> tuple[dict[str, float], ...]:
    """Return LSR-Adapt's points: three rates with the default alpha, two with four times that."""
    return (*rates(1e-3, 2e-3, 4e-3, alpha=2.0 * rank), *rates(1e-3, 2e-3, alpha=8.0 * rank))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training: all that its result depends on, besides the model and the data.

    Where a seed has no point, the one that the trials of tuning find best is taken.
    """

    task: str
    provider: str
    seed: int
    point: int | None = None

    @property
    def tunes(self) -> bool:
        """Whether it is scored on the development part."""
        return self.seed == TUNING_SEED

    @property
    def name(self) -> str:
        """What its result is called."""
        return f"{self.task}-{self.provider}-{f'tune{self.point}' if self.tunes else f'seed{self.seed}'}"


Measure = Callable[[Trial, dict[str, float]], dict[str, Any]]
# the same of several trials in one call; what failed is left out
MeasureSeveral = Callable[[list[tuple[Trial, dict[str, float]]]], dict[str, dict[str, Any]]]


def options(description: str | None, results: Path) -> argparse.ArgumentParser:
    """Return a parser of what every program of trials takes.

    Args:
        description: Of the program; its first line is shown.
        results: Where its results go.
    """
    parser = script_parser(description)
    add = parser.add_argument
    add("--data", type=Path, help="folder of <task>/<split>.jsonl.gz")
    add("--work", type=Path, help="for the parts and run folders")
    add("--results", type=Path, default=results)
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--time-limit", type=float, default=math.inf, help="seconds after which running jobs are stopped")
    add("--smoke", action="store_true", help="a few rows, two steps: is it wired up?")
    add("--dry-run", action="store_true", help="print the plan")
    add("--table", action="store_true", help="print what the results say")
    return parser


def check_options(parser: argparse.ArgumentParser, given: argparse.Namespace, results: Path) -> None:
    """Refuse what cannot be run, or what would put results of a trial of the program among measurements."""
    if None in (given.data, given.work):
        parser.error("--data and --work are needed")
    if given.smoke and results in (given.results, given.results.parent):
        parser.error("--smoke: its results are no measurements; give another folder with --results")


def plan(tasks: Iterable[str], providers: Iterable[str], seeds: int) -> list[Trial]:
    """Return the trials, task by task: tuning first, then seed by seed."""
    providers = list(providers)
    trials: list[Trial] = []
    for task in tasks:
        trials += [Trial(task, name, TUNING_SEED, index) for name in providers for index in range(NUM_POINTS)]
        trials += [Trial(task, name, seed) for seed in range(seeds) for name in providers]
    return trials


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Return the finished trials of a suite's folder by name, in the order of their names.

    Of a trial that was done again the last result counts; a line that a kill cut short is no result.
    """
    file = results / FILE
    done: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with contextlib.suppress(ValueError):
            result = json.loads(line)
            done[result.pop("name")] = result
    return dict(sorted(done.items()))


def add(results: Path, name: str, result: Mapping[str, Any]) -> None:
    """Add a finished trial's result to its suite's file, in one write."""
    results.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"name": name, **result}, ensure_ascii=False)
    with (results / FILE).open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        cut_short = size > 0 and stream.read(1) != b"\n"
        stream.write(f"{chr(10) if cut_short else ''}{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def best_point(task: str, provider: str, done: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Return the point with the best score on the development part; None while a trial is missing."""
    names = [Trial(task, provider, TUNING_SEED, index).name for index in range(NUM_POINTS)]
    if any(name not in done for name in names):
        return None
    # a run that went to infinity is the worst, not an error: that is what tuning is to find out
    scores = [done[name]["score"] for name in names]
    return max(range(NUM_POINTS), key=lambda index: -math.inf if scores[index] is None else scores[index])


def measured(measure: Measure, trial: Trial, point: dict[str, float]) -> dict[str, Any]:
    """Return a trial's result with its settings and how long it took; run in a worker."""
    began = time.monotonic()
    result = measure(trial, point)
    return {**dataclasses.asdict(trial), "settings": point, **result, "wall_s": round(time.monotonic() - began, 1)}


def measured_together(measure: MeasureSeveral, group: list[tuple[Trial, dict[str, float]]]) -> dict[str, Any]:
    """Return the results of several trials by name, as `measured` does; the time is each one's part of all."""
    began = time.monotonic()
    results = measure(group)
    seconds = round((time.monotonic() - began) / max(1, len(results)), 1)
    return {
        trial.name: {**dataclasses.asdict(trial), "settings": point, **results[trial.name], "wall_s": seconds}
        for trial, point in group
        if trial.name in results
    }


def execute(
    trials: list[Trial],
    providers: Mapping[str, Provider],
    measure: Measure,
    results: Path,
    jobs: int = 1,
    time_limit: float = math.inf,
    several: MeasureSeveral | None = None,
) -> int:
    """Do the trials that have no result yet, so many at a time; return how many failed or are left.

    Args:
        trials: What is to be done, in this order as far as it can be.
        providers: By the name that a trial has.
        measure: Trains once and returns at least `score`; sent to the workers, so a function of a module.
        results: Folder of the results.
        jobs: Workers.
        time_limit: Seconds after which running trials are stopped.
        several: Does, in the place of `measure` and of `jobs`, all trials that can be done at a time in one call.
    """
    if any(trial.tunes for trial in trials):
        tuned_alike(providers)
    # a result of a point that is another one by now is none
    known = {trial.name for trial in trials if trial.point is not None}
    done = {name: result for name, result in load(results).items() if name not in known or _is_point(result, providers)}
    waiting = [trial for trial in trials if not (trial.name in known and trial.name in done)]

    def next_job() -> Job | None:
        for trial in list(waiting):
            index = best_point(trial.task, trial.provider, done) if trial.point is None else trial.point
            if index is None:
                continue
            settings = providers[trial.provider].points[index]
            waiting.remove(trial)
            if trial.name not in done or done[trial.name]["settings"] != settings:
                return Job(trial.name, (trial, settings))
        return None

    def take(job: Job, result: dict[str, Any]) -> None:
        done[job.name] = result
        add(results, job.name, result)
        print(f"{job.name}: {result['score']} in {result['wall_s']} s", flush=True)

    lost = 0

    def next_group() -> Job | None:
        group = [job.arguments for job in iter(next_job, None)]
        return Job(f"{len(group)} trials", (group,)) if group else None

    def take_all(job: Job, results: dict[str, dict[str, Any]]) -> None:
        nonlocal lost
        for trial, point in job.arguments[0]:
            if trial.name in results:
                take(Job(trial.name, (trial, point)), results[trial.name])
            else:
                lost += 1
                print(f"{trial.name}: failed", flush=True)

    if several is None:
        failed, ended = do_all(next_job, functools.partial(measured, measure), take, jobs, time_limit)
    else:
        failed, ended = do_all(next_group, functools.partial(measured_together, several), take_all, 1, time_limit)
        ended = [Job(trial.name, ()) for job in ended for trial, _ in job.arguments[0]]
    failed += lost
    left = sum(trial.name not in done for trial in waiting) + len(ended)
    print(f"{left} trials left, {failed} failed")
    return failed + left


def _is_point(result: Mapping[str, Any], providers: Mapping[str, Provider]) -> bool:
    return result["settings"] == providers[result["provider"]].points[result["point"]]


def table(
    done: Mapping[str, Mapping[str, Any]], providers: Iterable[str], columns: Mapping[str, str] | None = None
) -> list[str]:
    """Return Markdown: a row a method, a column a task, mean and standard deviation over the seeds that are there.

    Args:
        done: Finished trials by name.
        providers: Which rows, in which order.
        columns: What a task's column is called, where not as the task.
    """
    tests = [result for result in done.values() if result["seed"] != TUNING_SEED]
    tasks = list(dict.fromkeys(result["task"] for result in tests))
    names = [str((columns or {}).get(task, task)) for task in tasks] + (["mean"] if len(tasks) > 1 else [])
    lines = [
        f"| method | parameters | {' | '.join(names)} | seeds | chosen settings |",
        f"|---|---:|{'---:|' * len(names)}---:|---|",
    ]
    for provider in providers:
        rows = sorted((r for r in tests if r["provider"] == provider), key=lambda r: tasks.index(r["task"]))
        if not rows:
            continue
        groups = {task: list(group) for task, group in itertools.groupby(rows, lambda r: r["task"])}
        shown = [spread([r["score"] for r in groups[task]]) if task in groups else "not run" for task in tasks]
        if len(tasks) > 1:
            by_seed = [[r["score"] for r in rows if r["seed"] == seed] for seed in sorted({r["seed"] for r in rows})]
            means = [statistics.fmean(s) for s in by_seed if len(s) == len(tasks) and None not in s]
            shown.append(spread(means) if means else "")
        counts = sorted({len(group) for group in groups.values()})
        settings = (
            ", ".join(f"{key} {value:g}" for key, value in group[0]["settings"].items()).replace("learning_rate", "lr")
            for group in groups.values()
        )
        cells = [provider, f"{rows[0]['adapter_parameters']:,}", *shown, " to ".join(map(str, counts))]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(dict.fromkeys(settings))} |")
    return lines


def spread(scores: Sequence[float | None]) -> str:
    """Return percent as mean +- standard deviation over seeds; a run that diverged is said, not left out."""
    finite = [100 * score for score in scores if score is not None]
    lost = f", {len(scores) - len(finite)} diverged" if len(finite) < len(scores) else ""
    if not finite:
        return f"all {len(scores)} diverged"
    deviation = f" +- {statistics.stdev(finite):.1f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.1f}{deviation}{lost}"
