"""Which adapter at which size? Held-out likelihood of every method at 5 thousand to 2.4 million parameters.

    python -m benchmarks.quality.frontier --data DATA --work WORK --model smollm2 --regime commonsense --time-limit 480
    python -m benchmarks.quality.frontier --data DATA --work WORK --model qwen=FOLDER --regime gsm8k --sizes 20k 60k
    python -m benchmarks.report.frontier_tables                                the tables and the figure, from results

Trials are those of `lsr-scale sweep`: as many as pay share a step on one base. Every trial that has ended is a line of
`trials.jsonl`; one that was killed goes on where its sweep was. What is measured, with the adapter in bf16 on its own
base: the negative log-likelihood of each right answer, in nats a token, and for questions with choices the accuracy.
Of GSM8K's solutions that is all, but with `--answers`, by which the model writes its own solution of each test question
(greedily), and the accuracy is of the number at its end.

Protocol. Rows are packed to 512 tokens, eight packs a step, AdamW, a rate that falls by a cosine after 6 % of warm-up.
Every adapter of `frontier_rows` is tuned alike: four rates, one epoch, a seed that no other trial uses, on a tenth of
the train part that is held out; where the best is the first or the last of them, the next one beyond it is tried, up to
two times. `--carry-rates` tunes some sizes like this, and rows at others around the best rate of a neighbour;
`--rates-from SUITE` does so by another suite's results (`frontier_trials`). Every result says which were tried first. A
rate is chosen by the right answers alone, and only they are scored for it. Alpha is the method's rule. The test part is
scored once a seed. Trials of the NF4 base are the product's; `--base none` repeats a row in bf16.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from benchmarks import ALL_RESULTS
from benchmarks.command_line import recorded, script_parser
from benchmarks.quality import trials
from benchmarks.quality.frontier_data import (
    PART_OF,
    REGIMES,
    judged,
    num_tokens,
    questions,
    right_alone,
    write_parts,
)
from benchmarks.quality.frontier_rows import MODELS, ROWS, SIZES, refused
from benchmarks.quality.frontier_trials import Elsewhere, Plan, Rates, Results, Suite, Trial, places
from benchmarks.quality.generated_answers import right_answers
from benchmarks.quality.rate_trials import packed, packed_bits
from lsr_scale import api, files
from lsr_scale.adapters.save_and_load import load_adapter, load_in_place
from lsr_scale.data.tasks import Example
from lsr_scale.fused import fuse, unfuse
from lsr_scale.model import load_base, load_tokenizer
from lsr_scale.scoring.scorer import EncodedExamples, NonFiniteScoresError, encode_examples, input_limit, score_encoded
from lsr_scale.sweeping.results import SweepResults, TrialResult

RESULTS = ALL_RESULTS / "frontier"
LONGEST, PACKS = 512, 8  # tokens of a pack, packs a step
SOLUTION = 320  # tokens of a solution that a model writes


def run_of(suite: Suite, output: Path) -> dict[str, Any]:
    """Return what the runs of a sweep share, as a YAML file has it."""
    tasks = REGIMES[suite.regime]
    folder = suite.work / "data"
    sources = [
        {"path": str(folder / task), "split": "train"}
        if suite.regime == "commonsense"
        else {"path": str(folder / task / "train.jsonl")}
        for task in tasks
    ]
    if suite.limit is not None:
        sources = [{**source, "limit": suite.limit} for source in sources]
    return {
        "model": {"name": suite.folder, "quantization": suite.base, "dtype": "bfloat16"},
        "data": {"train": sources},
        "training": {
            "output_dir": str(output),
            "max_steps": suite.max_steps,
            "per_device_train_batch_size": PACKS,
            "gradient_accumulation_steps": 1,
            "max_length": LONGEST,
            "packing": True,
            "memory": "speed",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.06,
            "save_strategy": "no",
            "logging_steps": 100,  # each waits for the GPU
        },
    }


def changes_of(suite: Suite, trial: Trial) -> dict[str, Any]:
    """Return what a trial changes of it."""
    row = suite.row(trial.place)
    return {
        "name": trial.name,
        "adapter": row.section(),
        **({"training.optim": row.optimizer} if row.optimizer else {}),
        "training.seed": trial.seed,
        "training.learning_rate": trial.rate,
        "training.num_train_epochs": suite.epochs(trial),
    }


def train(suite: Suite, chosen: Sequence[Trial], together: int | str) -> SweepResults:
    """Train trials on one loading of their base; a sweep of the same trials that was ended goes on."""
    entries = [changes_of(suite, trial) for trial in chosen]
    content = json.dumps([entries, run_of(suite, Path())], sort_keys=True)
    output = sweeps(suite) / hashlib.sha256(content.encode()).hexdigest()[:12]
    section = {"list": entries, "together": together}
    return api.sweep(run_of(suite, output), section, resume="auto" if output.is_dir() else None, pages=False)


def sweeps(suite: Suite) -> Path:
    """Return the folder of the suite's sweep that is under way."""
    return suite.work / "sweeps" / suite.prefix


def under_way(suite: Suite) -> dict[Trial, Rates]:
    """Return the trials of the sweep that was under way when the program was ended, none if there is none."""
    file = sweeps(suite) / "trials.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    pairs = [(Trial(**one["trial"]), Rates.stored(one["rates"])) for one in found]
    return {trial: rates for trial, rates in pairs if trial.row in ROWS[suite.model].get(trial.size, {})}


def begin(suite: Suite, chosen: Mapping[Trial, Rates]) -> None:
    """Note which trials a sweep has, so that this one goes on, whatever of it has been scored by then."""
    content = [{"trial": dataclasses.asdict(one), "rates": dataclasses.asdict(two)} for one, two in chosen.items()]
    files.write_text(sweeps(suite) / "trials.json", json.dumps(content))


class Scorer:
    """The base, loaded once, on which one adapter after the other is scored; questions are encoded once.

    An adapter stays on the base until another is scored, of which only the tensors are loaded where it is alike.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.tokenizer: Any = load_tokenizer(suite.folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base: Any = load_base(suite.folder, quantization=suite.base, dtype="bfloat16", device=self.device)
        self._adapted: PeftModel | None = None  # the base with the last adapter
        self._parts: dict[str, tuple[dict[str, list[Example]], dict[str, np.ndarray]]] = {}
        self._encoded: dict[tuple[str, bool], EncodedExamples] = {}

    def part(self, name: str) -> tuple[dict[str, list[Example]], dict[str, np.ndarray]]:
        """Return a part's questions by task, and how many tokens their right answers have."""
        if name not in self._parts:
            asked = questions(self.suite.work, self.suite.regime, name, self.suite.limit)
            self._parts[name] = asked, {task: num_tokens(self.tokenizer, rows) for task, rows in asked.items()}
        return self._parts[name]

    def encoded(self, part: str, choices: bool) -> EncodedExamples:
        """Return a part's questions as the model is asked them, on its device: with all choices, or the right ones."""
        if (part, choices) not in self._encoded:
            asked = [row for rows in self.part(part)[0].values() for row in rows]
            made = encode_examples(
                self.tokenizer,
                asked if choices else [right_alone(row) for row in asked],
                batch_tokens=32_768 if self.device.type == "cuda" else 4_096,
                max_length=input_limit(self.base),
            )
            made.keep_on(self.device)
            self._encoded[part, choices] = made
        return self._encoded[part, choices]

    def model(self, adapter: Path | None) -> Any:
        """Return the base with an adapter of a folder, or alone."""
        if adapter is not None and self._adapted is not None and load_in_place(self._adapted, adapter) is not None:
            return self._adapted
        if self._adapted is not None:
            unfuse(self._adapted)
            self.base, self._adapted = self._adapted.unload(), None
        if adapter is None:
            return self.base
        self._adapted = load_adapter(self.base, adapter)[0]
        if self.device.type == "cuda":
            fuse(self._adapted, cache_weights=True)  # as in training
        return self._adapted

    def score(self, adapter: Path | None, part: str, choices: bool = True) -> dict[str, Any]:
        """Return what an adapter, or the base alone, makes of a part's answers.

        Args:
            adapter: Its folder, None for the base alone.
            part: "dev" or "test".
            choices: Score the wrong choices too, which only the accuracy is of.

        Returns:
            `nll`, nats a token over all answers; `nll_se`, its standard error over questions; `accuracy` (None without
            choices, unless questions were answered); `tasks`; `losses`, nats of each answer, and `right`, both in the
            order of the tasks; `score_s`.
        """
        asked, counts = self.part(part)
        encoded = self.encoded(part, choices)
        began = time.monotonic()
        predicted = score_encoded(self.model(adapter), self.tokenizer, encoded).predictions
        seconds = round(time.monotonic() - began, 2)
        losses = np.array([-one.log_likelihoods[one.answer] for one in predicted])
        right = np.array([one.choice == one.answer for one in predicted])
        has_choices = any(len(one.log_likelihoods) > 1 for one in predicted)
        tokens = np.concatenate(list(counts.values()))
        tasks, start = {}, 0
        for task, rows in asked.items():
            mine = slice(start, start + len(rows))
            start += len(rows)
            tasks[task] = {"rows": len(rows), "nll": float(losses[mine].sum() / tokens[mine].sum())}
            if has_choices:
                tasks[task]["accuracy"] = float(right[mine].mean())
        nll, error = mean_per_token(losses, tokens)
        accuracy = statistics.fmean(task["accuracy"] for task in tasks.values()) if has_choices else None
        return {
            **{"nll": nll, "nll_se": error, "accuracy": accuracy, "tasks": tasks},
            **{"losses": packed(losses), **({"right": packed_bits(right)} if has_choices else {})},
            "score_s": seconds,
            **(self.answer(adapter, part) if self.suite.answers and choices and part == PART_OF[False] else {}),
        }

    def answer(self, adapter: Path | None, part: str) -> dict[str, Any]:
        """Return which of GSM8K's questions an adapter, or the base alone, answers rightly, and how long that took."""
        asked = judged(self.suite.work, part, self.suite.limit)
        began = time.monotonic()
        right = right_answers(self.model(adapter).eval(), self.tokenizer, asked, len(asked), SOLUTION)
        seconds = round(time.monotonic() - began, 2)
        return {"accuracy": statistics.fmean(right), "right": packed_bits(np.array(right)), "answer_s": seconds}


def mean_per_token(losses: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the nats a token of all answers, and the standard error of that ratio over answers (its linearization)."""
    ratio = losses.sum() / tokens.sum()
    spread = (losses - ratio * tokens).std(ddof=1) if len(losses) > 1 else 0.0
    return float(ratio), float(spread / tokens.mean() / math.sqrt(len(losses)))


def result_of(suite: Suite, trial: Trial, rates: Rates, trained: TrialResult, scorer: Scorer) -> dict[str, Any]:
    """Return a trial's line; of one that diverged, or whose scores are not finite, `nll` is None.

    A rate is chosen by the right answers alone: of a trial that is for that, no other choices are scored, and no losses
    of single answers are kept.
    """
    row = suite.row(trial.place)
    copied = ("trainable_parameters", "steps", "tokens", "final_loss", "tokens_per_s", "training_s")
    about = {
        **suite.about,
        **dataclasses.asdict(trial),
        **dataclasses.asdict(rates),
        **{
            "method": row.method,
            "options": dict(row.options),
            "optimizer": row.optimizer,
            "part": PART_OF[trial.tunes],
            "status": trained.status,
        },
        **{key: trained.results[key] for key in copied if key in trained.results},
    }
    if trained.status != "finished":
        return {**about, "nll": None, "error": trained.error}
    try:
        scores = scorer.score(trained.folder / "adapter", PART_OF[trial.tunes], choices=not trial.tunes)
    except NonFiniteScoresError as error:
        return {**about, "status": "diverged", "nll": None, "error": str(error)}
    kept = {key: value for key, value in scores.items() if not trial.tunes or key not in ("losses", "right")}
    return {**about, **kept}


class Program:
    """One call: sweep after sweep, until nothing is left or the time is over.

    A trial that fails has no result, and is not tried again by this call; one that diverges has, that it did.
    """

    def __init__(self, suite: Suite, given: Any, described: dict[str, Any]) -> None:
        """Take what the trials share, the arguments of the command, and what is in the parts of the data."""
        self.suite, self.given, self.described = suite, given, described
        self.places = places(suite, given.sizes, given.rows)
        self.failed: set[Trial] = set()
        self.env = files.environment()
        self.pace: dict[bool, float] = {}  # seconds that an epoch of a trial took, of the last sweep, fused or not
        self._scorer: Scorer | None = None
        self.elsewhere: Elsewhere | None = None
        if given.rates_from is not None:
            model, regime, base = given.rates_from.split("-")
            self.elsewhere = Elsewhere(Suite(suite.work, model, "", regime, base), trials.load(RESULTS))

    @property
    def scorer(self) -> Scorer:
        """The base, loaded when it is first needed."""
        self._scorer = self._scorer or Scorer(self.suite)
        return self._scorer

    def execute(self) -> int:
        """Do what has no result yet; return how many trials are left of those that can be done now."""
        end = time.monotonic() + self.given.time_limit
        while True:
            done = trials.load(self.given.results)
            failed = {trial.place for trial in self.failed}
            plan = Plan(self.suite, self.places, done, self.given.carry_rates, failed, self.elsewhere)
            left = plan.trials(self.given.seeds)
            ready = {trial: rates for trial, rates in left.items() if trial not in self.failed}
            again = under_way(self.suite)
            chosen = again or self.fitting(ready, end - time.monotonic())
            if not chosen or time.monotonic() > end:
                return len(left)
            self.score_base(done)
            print(f"{len(ready)} trials can be done; a sweep of {len(chosen)}", flush=True)
            start = time.monotonic()
            self.sweep(chosen, done)
            if not again:
                fused = self.is_fused(next(iter(chosen)))
                self.pace[fused] = (time.monotonic() - start) / sum(map(self.suite.epochs, chosen))

    def is_fused(self, trial: Trial) -> bool:
        """Tell whether a trial's training takes the fused layers."""
        return self.suite.row(trial.place).is_fused

    def fitting(self, ready: Mapping[Trial, Rates], seconds: float) -> dict[Trial, Rates]:
        """Return the first of the trials, so many as would end in time by the pace of the sweep before.

        Those that run unfused come last, in sweeps of their own; of a sweep, those that end with one another are
        neighbours, as graphs are captured anew where the trials of a step change.
        """
        fused = any(map(self.is_fused, ready))
        alike = [trial for trial in ready if self.is_fused(trial) == fused]
        chosen, total = [], 0.0
        for trial in alike[: self.given.trials_a_sweep]:
            total += self.pace.get(fused, 0.0) * self.suite.epochs(trial)
            if total > seconds:
                break
            chosen.append(trial)
        return {trial: ready[trial] for trial in sorted(chosen, key=self.suite.epochs, reverse=True)}

    def score_base(self, done: Results) -> None:
        """Keep how long the answers of each part are, and what the base alone makes of them.

        Raises:
            SystemExit: if the results that are there are of other data.
        """
        of_data = {"data": self.described, "limit": self.suite.limit}
        for part in PART_OF.values():
            name = f"{self.suite.prefix}-base-{part}"
            if name not in done:
                counts = np.concatenate(list(self.scorer.part(part)[1].values()))
                about = {**self.suite.about, "row": "base", "part": part, "answer_tokens": packed(counts), **of_data}
                trials.add(self.given.results, name, {**about, **self.scorer.score(None, part), "env": self.env})
            elif {key: done[name].get(key) for key in of_data} != of_data:
                raise SystemExit(f"{self.given.results}: {name} is of other rows than --data has; put them elsewhere")

    def sweep(self, chosen: Mapping[Trial, Rates], done: Results) -> None:
        """Train trials, score those that have no result yet, and say how long both took."""
        suite, given = self.suite, self.given
        start = time.monotonic()
        begin(suite, chosen)
        trained = {result.name: result for result in train(suite, list(chosen), given.together)}
        sweep_s = round(time.monotonic() - start, 1)
        shared = {"sweep_s": sweep_s, "sweep_trials": len(chosen), "command": given.command, "env": self.env}
        for trial, rates in chosen.items():
            name = f"{suite.prefix}-{trial.name}"
            if name in done:
                continue
            error = trained[trial.name].error if trained[trial.name].status == "failed" else None
            if error is None:
                try:
                    result = result_of(suite, trial, rates, trained[trial.name], self.scorer)
                except Exception as what:
                    error = f"{type(what).__name__}: {what}"
            if error is not None:
                self.failed.add(trial)
                self._scorer = None  # an adapter may be half loaded
                print(f"{trial.name}: failed: {error}", flush=True)
                continue
            trials.add(given.results, name, {**result, **shared})
            score = "diverged" if result["nll"] is None else f"{result['nll']:.4f} nats a token"
            print(f"{trial.name}: {score}", flush=True)
        score_s = time.monotonic() - start - sweep_s
        print(f"sweep: {sweep_s:.1f} s of set-up and training, {score_s:.1f} s of scoring", flush=True)
        shutil.rmtree(sweeps(suite), ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Do the trials that have no result yet; return the exit status."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of <task>/<split>.jsonl.gz")
    add("--work", type=Path, required=True, help="for the parts and sweeps, of one call at a time")
    add("--results", type=Path, default=RESULTS)
    add("--model", default="smollm2", help="smollm2, or qwen=FOLDER of its weights")
    add("--regime", default="commonsense", choices=list(REGIMES))
    add("--base", default="nf4", choices=["nf4", "none", "int8"])
    add("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    add("--rows", nargs="+", help="of the table in frontier_rows; by default all but variants")
    add("--seeds", type=int, default=3)
    add("--carry-rates", action="store_true", help="tune some sizes in full, and others around their best rates")
    suites = ["-".join(of) for of in itertools.product(MODELS, REGIMES, ("nf4", "none", "int8"))]
    add(
        "--rates-from",
        choices=suites,
        metavar="MODEL-REGIME-BASE",
        help="try the best rates of committed results first",
    )
    add("--together", default="auto", type=lambda text: text if text == "auto" else int(text))
    add("--trials-a-sweep", type=int, default=48, help="trained on one loading of the base, before they are scored")
    add("--time-limit", type=float, default=math.inf, help="seconds; no sweep begins that would end later")
    add("--answers", action="store_true", help="of GSM8K: each seed's adapter answers the test questions too")
    add("--smoke", action="store_true", help="16 rows a task, two steps: is it wired up?")
    given = parser.parse_args(arguments)
    model, _, folder = given.model.partition("=")
    if model not in MODELS:
        parser.error(f"--model: expected {' or '.join(MODELS)}, got {model!r}")
    if given.smoke and given.results == RESULTS:
        parser.error("--smoke: its results are no measurements; give another folder with --results")
    if given.answers and given.regime != "gsm8k":
        parser.error("--answers: only questions of --regime gsm8k are answered; others have choices, which are scored")
    rows = {f"{size} {name}": row for size in given.sizes for name, row in ROWS[model].get(size, {}).items()}
    asked = {name: row for name, row in rows.items() if not given.rows or name.split()[1] in given.rows}
    if line := refused(asked, given.base):
        print(line, flush=True)
    if not any(row.takes(given.base) for row in asked.values()):
        parser.error(f"--rows: none of them can be run: {line or 'no size has a row of that name'}")
    words = [word if not word.startswith(("/", "~", ".")) else Path(word).name for word in arguments or sys.argv[1:]]
    given.command = recorded("quality.frontier", words)
    limits = {"limit": 16, "max_steps": 2} if given.smoke else {}
    work = given.work.resolve()
    suite = Suite(work, model, folder or MODELS[model], given.regime, given.base, **limits, answers=given.answers)
    left = Program(suite, given, write_parts(given.data, work, given.regime)).execute()
    print(f"{left} trials left, of those that can be done now" if left else "all trials are done")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
