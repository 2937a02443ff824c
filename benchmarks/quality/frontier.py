"""Which adapter at which size? Held-out likelihood of every method at 5 thousand to 2.4 million parameters.

    python -m benchmarks.quality.frontier --data DATA --work WORK --model smollm2 --regime commonsense --time-limit 480
    python -m benchmarks.quality.frontier --data DATA --work WORK --model qwen=FOLDER --regime gsm8k --sizes 20k 60k
    python -m benchmarks.report.frontier_tables                                the tables and the figure, from results

Trials are those of `lsr-scale sweep`: as many as pay share a step on one base. Every trial that has ended is a line of
`trials.jsonl`; one that was killed goes on where its sweep was. What is measured, with the adapter in bf16 on its own
base: the negative log-likelihood of each right answer, in nats a token, and for questions with choices the accuracy.

Protocol. Rows are packed to 512 tokens, eight packs a step, AdamW, a rate that falls by a cosine after 6 % of warm-up.
Every adapter of `frontier_rows` is tuned alike: four rates, one epoch, a seed that no other trial uses, on a tenth of
the train part that is held out; where the best is the first or the last of them, the next one beyond it is tried, up to
two times. Alpha is the method's rule. The test part is scored once a seed. Trials of the NF4 base are the product's;
`--base none` repeats a row in bf16.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ALL_RESULTS
from benchmarks.command_line import recorded, script_parser
from benchmarks.quality import trials
from benchmarks.quality.frontier_data import EPOCHS, PART_OF, REGIMES, num_tokens, questions, right_alone, write_parts
from benchmarks.quality.frontier_rows import MODELS, ROWS, SIZES, AdapterRow
from benchmarks.quality.rate_trials import RateTrial, packed, packed_bits, rates_left
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale import api, files
from lsr_scale.adapters.save_and_load import load_adapter
from lsr_scale.data.tasks import Example
from lsr_scale.model import Quantization, load_base, load_tokenizer
from lsr_scale.scoring.scorer import EncodedExamples, encode_examples, input_limit, score_encoded
from lsr_scale.sweeping.results import SweepResults, TrialResult

RESULTS = ALL_RESULTS / "frontier"
LONGEST, PACKS = 512, 8  # tokens of a pack, packs a step
MOST_BEYOND = 2  # rates tried beyond an end
Results = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What the trials of one call share: model, base and texts, and where their files are."""

    work: Path
    model: str  # "smollm2" or "qwen"
    folder: str  # the model's name or folder
    regime: str
    base: Quantization
    limit: int | None = None  # of rows and questions: a trial of the program
    max_steps: int = -1

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        return {"model": self.model, "regime": self.regime, "base": self.base}

    @property
    def prefix(self) -> str:
        """The beginning of its trials' names."""
        return f"{self.model}-{self.regime}-{self.base}"


@dataclasses.dataclass(frozen=True)
class Trial(RateTrial):
    """One training: an adapter at a size, a rate and a seed."""

    size: str
    row: str
    seed: int
    rate: float


def rates_to_try(row: AdapterRow, tuned: Mapping[float, float]) -> tuple[float, ...]:
    """Return the rates of a row that have no result yet; none left once the best is between two others.

    Args:
        row: The adapter.
        tuned: The nats a token of each rate that was tried, infinite where the training diverged.
    """
    return rates_left(row.rates, tuned, MOST_BEYOND)


def tuned_rates(suite: Suite, size: str, row: str, done: Results) -> dict[float, float]:
    """Return the nats a token of the rates that were tried of a row."""
    start = f"{suite.prefix}-{size}-{row}-tune-"
    found = (result for name, result in done.items() if name.startswith(start))
    return {result["rate"]: math.inf if result["nll"] is None else result["nll"] for result in found}


def next_trials(
    suite: Suite, sizes: Iterable[str], rows: Iterable[str] | None, seeds: int, done: Results
) -> list[Trial]:
    """Return the trials that can be done now: rates to be tried, and seeds at rates that were chosen."""
    found = []
    for size in sizes:
        for name, row in ROWS[suite.model].get(size, {}).items():
            if (name not in rows if rows else "+" in name) or not row.takes(suite.base):
                continue
            tuned = tuned_rates(suite, size, name, done)
            if left := rates_to_try(row, tuned):
                found += [Trial(size, name, TUNING_SEED, rate) for rate in left]
            else:
                best = min(tuned, key=lambda rate: tuned[rate])
                found += [Trial(size, name, seed, best) for seed in range(seeds)]
    return [trial for trial in found if f"{suite.prefix}-{trial.name}" not in done]


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
    row = ROWS[suite.model][trial.size][trial.row]
    return {
        "name": trial.name,
        "adapter": row.section(),
        **({"training.optim": row.optimizer} if row.optimizer else {}),
        "training.seed": trial.seed,
        "training.learning_rate": trial.rate,
        "training.num_train_epochs": 1 if trial.tunes else EPOCHS[suite.regime],
    }


def train(suite: Suite, chosen: Sequence[Trial], together: int | str) -> SweepResults:
    """Train trials on one loading of their base; a sweep of the same trials that was ended goes on."""
    entries = [changes_of(suite, trial) for trial in chosen]
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:12]
    output = suite.work / "sweeps" / f"{suite.prefix}-{digest}"
    section = {"list": entries, "together": together}
    return api.sweep(run_of(suite, output), section, resume="auto" if output.is_dir() else None, pages=False)


class Scorer:
    """The base, loaded once, on which one adapter after the other is scored; questions are encoded once."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.tokenizer: Any = load_tokenizer(suite.folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base: Any = load_base(suite.folder, quantization=suite.base, dtype="bfloat16", device=self.device)
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

    def score(self, adapter: Path | None, part: str, choices: bool = True) -> dict[str, Any]:
        """Return what an adapter, or the base alone, makes of a part's answers.

        Args:
            adapter: Its folder, None for the base alone.
            part: "dev" or "test".
            choices: Score the wrong choices too, which only the accuracy is of.

        Returns:
            `nll`, nats a token over all answers; `nll_se`, its standard error over questions; `accuracy` (None without
            choices); `tasks`; `losses`, nats of each answer, and `right`, both in the order of the tasks; `score_s`.
        """
        asked, counts = self.part(part)
        encoded = self.encoded(part, choices)
        began = time.monotonic()
        model = self.base if adapter is None else load_adapter(self.base, adapter)[0]
        try:
            predicted = score_encoded(model, self.tokenizer, encoded).predictions
        finally:
            if adapter is not None:
                self.base = model.unload()
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
        }


def mean_per_token(losses: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the nats a token of all answers, and the standard error of that ratio over answers (its linearization)."""
    ratio = losses.sum() / tokens.sum()
    spread = (losses - ratio * tokens).std(ddof=1) if len(losses) > 1 else 0.0
    return float(ratio), float(spread / tokens.mean() / math.sqrt(len(losses)))


def result_of(suite: Suite, trial: Trial, trained: TrialResult, scorer: Scorer) -> dict[str, Any]:
    """Return a trial's line; of one that diverged, `nll` is None.

    A rate is chosen by the right answers alone: of a trial that is for that, no other choices are scored, and no losses
    of single answers are kept.
    """
    row = ROWS[suite.model][trial.size][trial.row]
    copied = ("trainable_parameters", "steps", "tokens", "final_loss", "tokens_per_s", "training_s")
    about = {
        **suite.about,
        **dataclasses.asdict(trial),
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
    scores = scorer.score(trained.folder / "adapter", PART_OF[trial.tunes], choices=not trial.tunes)
    kept = {key: value for key, value in scores.items() if not trial.tunes or key not in ("losses", "right")}
    return {**about, **kept}


def execute(suite: Suite, given: Any, described: dict[str, Any]) -> int:
    """Do what has no result yet, sweep after sweep, until nothing is left or the time is over; return what is left.

    A trial that fails has no result, and is not tried again by this call; one that diverges has, that it did.
    """
    began, scorer = time.monotonic(), None
    failed: set[Trial] = set()
    env = files.environment()
    while True:
        done = trials.load(given.results)
        left = next_trials(suite, given.sizes, given.rows, given.seeds, done)
        ready = [trial for trial in left if trial not in failed]
        if not ready or time.monotonic() - began > given.time_limit:
            return len(left)
        scorer = scorer or Scorer(suite)
        for part in PART_OF.values():  # how long the answers are, and the base's own scores
            name = f"{suite.prefix}-base-{part}"
            if name not in done:
                counts = np.concatenate(list(scorer.part(part)[1].values()))
                about = {**suite.about, "row": "base", "part": part, "answer_tokens": packed(counts), "data": described}
                trials.add(given.results, name, {**about, **scorer.score(None, part), "env": env})
        chosen = ready[: given.trials_a_sweep]
        print(f"{len(ready)} trials can be done, {len(chosen)} of them now", flush=True)
        start = time.monotonic()
        trained = {result.name: result for result in train(suite, chosen, given.together)}
        sweep_s = round(time.monotonic() - start, 1)
        for trial in chosen:
            if trained[trial.name].status == "failed":
                failed.add(trial)
                print(f"{trial.name}: failed: {trained[trial.name].error}", flush=True)
                continue
            result = result_of(suite, trial, trained[trial.name], scorer)
            shared = {"sweep_s": sweep_s, "sweep_trials": len(chosen), "command": given.command, "env": env}
            trials.add(given.results, f"{suite.prefix}-{trial.name}", {**result, **shared})
            score = "diverged" if result["nll"] is None else f"{result['nll']:.4f} nats a token"
            print(f"{trial.name}: {score}", flush=True)
        score_s = time.monotonic() - start - sweep_s
        print(f"sweep: {sweep_s:.1f} s of set-up and training, {score_s:.1f} s of scoring", flush=True)
        shutil.rmtree(suite.work / "sweeps", ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Do the trials that have no result yet; return the exit status."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of <task>/<split>.jsonl.gz")
    add("--work", type=Path, required=True, help="for the parts and sweeps")
    add("--results", type=Path, default=RESULTS)
    add("--model", default="smollm2", help="smollm2, or qwen=FOLDER of its weights")
    add("--regime", default="commonsense", choices=list(REGIMES))
    add("--base", default="nf4", choices=["nf4", "none", "int8"])
    add("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    add("--rows", nargs="+", help="of the table in frontier_rows; by default all but variants")
    add("--seeds", type=int, default=3)
    add("--together", default="auto", type=lambda text: text if text == "auto" else int(text))
    add("--trials-a-sweep", type=int, default=48, help="trained on one loading of the base, before they are scored")
    add("--time-limit", type=float, default=math.inf, help="seconds after which no further sweep begins")
    add("--smoke", action="store_true", help="16 rows a task, two steps: is it wired up?")
    given = parser.parse_args(arguments)
    model, _, folder = given.model.partition("=")
    if model not in MODELS:
        parser.error(f"--model: expected {' or '.join(MODELS)}, got {model!r}")
    if given.smoke and given.results == RESULTS:
        parser.error("--smoke: its results are no measurements; give another folder with --results")
    words = [word if not word.startswith(("/", "~", ".")) else Path(word).name for word in arguments or sys.argv[1:]]
    given.command = recorded("quality.frontier", words)
    limits = {"limit": 16, "max_steps": 2} if given.smoke else {}
    work = given.work.resolve()
    suite = Suite(work, model, folder or MODELS[model], given.regime, given.base, **limits)
    left = execute(suite, given, write_parts(given.data, work, given.regime))
    print(f"{left} trials left, of those that can be done now" if left else "all trials are done")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
