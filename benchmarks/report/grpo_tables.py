"""What `quality/grpo_gsm8k.py` found: accuracy by adapter, GRPO beside SFT, and the rewards while it trained.

python -m benchmarks.report.grpo_tables                 print the tables
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import estimates, trials
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.frontier_rows import OURS, AdapterRow
from benchmarks.quality.grpo_gsm8k import RESULTS
from benchmarks.quality.grpo_rows import REFERENCE, ROWS, TRAININGS
from benchmarks.quality.rate_trials import unpacked
from benchmarks.quality.trials import TUNING_SEED
from benchmarks.report.drawing import card, count_ticks, rows_digest, save
from benchmarks.report.markdown import grid, number
from benchmarks.report.plots import Plot

NAMES = {"lora": "LoRA", "lsr": "LSR-Adapt", "lora_xs": "LoRA-XS", "kron_lora": "Kron-LoRA", "tinylora": "TinyLoRA"}
MODELS = {"qwen": "Qwen2.5-Coder-0.5B-Instruct"}
SMOOTHED = 5  # steps
Results = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
    """What the seeds of an adapter reached by one training.

    Attributes:
        training: "grpo" or "sft".
        row: A row of `grpo_rows`.
        right: `[seeds, questions]`, whether each test question was answered rightly.
        results: The seeds' lines.
    """

    training: str
    row: str
    right: np.ndarray
    results: list[dict[str, Any]]

    @property
    def accuracy(self) -> Estimate:
        """Mean over questions and seeds."""
        return estimates.mean(self.right, np.ones(self.right.shape[1]))

    def over(self, other: "Score") -> Estimate:
        """Return the accuracy less another's, on the same questions."""
        return estimates.difference(self.right, other.right, np.ones(self.right.shape[1]))


def suites(done: Results) -> list[str]:
    """Return the suites that have a seed on the test questions."""
    return list(dict.fromkeys(r["suite"] for r in done.values() if "right" in r and r["row"] != "base"))


def scores(done: Results, suite: str) -> list[Score]:
    """Return a suite's adapters by training, in the order of `grpo_rows`; those whose seeds all finished."""
    found = []
    for training, row in itertools.product(TRAININGS, ROWS):
        mine = [r for r in done.values() if (r["suite"], r["row"], r.get("training")) == (suite, row, training)]
        mine = [r for r in mine if r["seed"] != TUNING_SEED]
        if mine and all("right" in r for r in mine):
            found.append(Score(training, row, np.array([unpacked(r["right"]) for r in mine], np.float64), mine))
    return found


def label(row: str) -> str:
    """Return what a row is called."""
    adapter: AdapterRow = ROWS[row]
    options = dict(adapter.options)
    words = [f"r={options['rank']}"]
    words += [f"s={options['separation_rank']}"] if "separation_rank" in options else []
    words += [f"({options['left_in']}, {options['left_out']})"] if "left_in" in options else []
    words += [f"u={options['u']}"] if "u" in options else []
    if "target_modules" in options:
        words.append("on " + ", ".join(name.removesuffix("_proj") for name in options["target_modules"]))
    return " ".join([NAMES[adapter.method], *words])


def table(done: Results, suite: str) -> str:
    """Return a suite's table: a row an adapter, GRPO and then SFT, each less the same training of LoRA r=8."""
    found = {(score.training, score.row): score for score in scores(done, suite)}
    base = done.get(f"{suite}-base", {}).get("accuracy")
    body = [["no adapter", "0", "", *[number(base and 100 * base, ".1f"), ""] * 2, "", ""]]
    for row in ROWS:
        of_row = {training: found.get((training, row)) for training in TRAININGS}
        if not any(of_row.values()):
            continue
        mine = next(score for score in of_row.values() if score is not None)
        parameters = mine.results[0]["trainable_parameters"]
        reference = next((s.results[0]["trainable_parameters"] for s in found.values() if s.row == REFERENCE), None)
        share = "" if reference is None else f"{100 * parameters / reference:.1f}"
        name = f"**{label(row)}**" if ROWS[row].method in OURS else label(row)
        cells = [name, f"{parameters:,}", share]
        for training, score in of_row.items():
            cells.append("" if score is None else accuracy_cell(score))
            cells.append(difference_cell(score, found.get((training, REFERENCE))))
        grpo = of_row["grpo"]
        cells.append("" if grpo is None else f"{statistics.fmean(step_seconds(grpo)):.1f}")
        cells.append(", ".join(f"{s.results[0]['rate']:g}" for s in of_row.values() if s is not None))
        body.append(cells)
    head = ["adapter", "parameters", "% of LoRA r=8's", "GRPO, %", "less LoRA r=8 (95 %)"]
    return grid([*head, "SFT, %", "less LoRA r=8 (95 %)", "s a step, GRPO", "rates"], body)


def tuning_table(done: Results, suite: str) -> str:
    """Return what each rate reached in tuning, the chosen one in bold: mean reward of GRPO, loss of SFT."""
    body = []
    for row in ROWS:
        cells = []
        for training in TRAININGS:
            mine = [r for r in done.values() if (r["suite"], r["row"], r.get("training")) == (suite, row, training)]
            tried = {r["rate"]: r["score"] for r in mine if r["seed"] == TUNING_SEED}
            best = max(sorted(tried), key=lambda rate: -math.inf if tried[rate] is None else tried[rate], default=None)
            shown = {
                rate: f"{rate:g}: {'diverged' if tried[rate] is None else format(abs(tried[rate]), '.3f')}"
                for rate in sorted(tried)
            }
            cells.append(", ".join(f"**{text}**" if rate == best else text for rate, text in shown.items()))
        if any(cells):
            body.append([label(row), *cells])
    return grid(["tuning, by rate", "mean reward of the last steps, GRPO", "mean loss, SFT"], body)


def accuracy_cell(score: Score) -> str:
    """Return a score in percent, and in brackets that of each seed."""
    by_seed = 100 * score.right.mean(1)
    spread = f" ({', '.join(f'{one:.1f}' for one in by_seed)})" if len(by_seed) > 1 else ""
    return f"{100 * score.accuracy.value:.1f}{spread}"


def difference_cell(score: Score | None, reference: Score | None) -> str:
    """Return in points how far a score is above the reference of the same training, with its interval."""
    if score is None or reference is None or score is reference:
        return ""
    over = score.over(reference)
    low, high = (100 * end for end in over.interval)
    return f"{100 * over.value:+.1f} ({low:+.1f} to {high:+.1f})"


def step_seconds(score: Score) -> list[float]:
    """Return the seconds of a step of each seed, the mean over its run."""
    return [result["curve"]["s"][-1] / len(result["curve"]["s"]) for result in score.results]


def smoothed(values: list[float]) -> list[float]:
    """Return the mean of each step and those before it, `SMOOTHED` in all."""
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def mean_curve(score: Score, name: str) -> list[float]:
    """Return a curve, the mean over seeds, as far as all have it."""
    return [statistics.fmean(values) for values in zip(*(r["curve"][name] for r in score.results), strict=False)]


def draw(done: Results, suite: str, path: Path) -> None:
    """Draw accuracy against parameters, GRPO and SFT, and GRPO's reward against steps and against seconds."""
    from matplotlib import pyplot

    figure, (sizes, steps, seconds) = pyplot.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1.4, 1, 1))
    found = scores(done, suite)
    colors = {row: f"C{index}" for index, row in enumerate(ROWS)}
    counts = [score.results[0]["trainable_parameters"] for score in found]
    for training, face in (("grpo", "full"), ("sft", "none")):
        for score, count in zip(found, counts, strict=True):
            if score.training == training:
                error = 100 * score.accuracy.error
                style = {"fmt": "s" if ROWS[score.row].method in OURS else "o", "fillstyle": face, "capsize": 3}
                sizes.errorbar(count, 100 * score.accuracy.value, error, color=colors[score.row], **style)
    base = done.get(f"{suite}-base", {}).get("accuracy")
    if base is not None:
        sizes.axhline(100 * base, color="black", lw=1, ls=":")
    sizes.set_xscale("log")
    count_ticks(sizes.xaxis, min(counts), max(counts))
    sizes.tick_params(axis="x", labelsize=7)
    sizes.set_xlabel("trainable parameters (filled: GRPO; open: SFT; dotted: no adapter)")
    sizes.set_ylabel("test questions right, % (bars: standard error)")
    for score in found:
        if score.training == "grpo":
            reward = smoothed(mean_curve(score, "reward"))
            style = {"color": colors[score.row], "label": label(score.row), "lw": 1.5}
            steps.plot(range(1, len(reward) + 1), reward, **style)
            seconds.plot(mean_curve(score, "s"), reward, **style)
    jobs = max((r["jobs"] for score in found for r in score.results), default=1)
    steps.set_xlabel("step")
    steps.set_ylabel(f"reward: right completions ({SMOOTHED} steps' mean)")
    seconds.set_xlabel(f"seconds of training, up to {jobs} runs side by side")
    if steps.lines:
        steps.legend(frameon=False, fontsize=8)
    for axis in (sizes, steps, seconds):
        axis.grid(alpha=0.3)
    figure.suptitle(heading(done, suite), fontsize=11)
    figure.tight_layout()
    save(figure, path, digest(done, suite))


def heading(done: Results, suite: str) -> str:
    """Return what a suite is called."""
    first = next(result for result in done.values() if result["suite"] == suite)
    base = "bf16" if first["base"] == "none" else first["base"].upper()
    size = f"{first['steps']} steps of {first['prompts']} prompts x {first['completions']} completions"
    return f"{MODELS.get(first['model'], first['model'])}, {base} base, GSM8K: {size}, one {card(first['env'])}"


def digest(done: Results, suite: str) -> str:
    """Return what a suite's figure is recognized by."""
    mine = [r for r in done.values() if r["suite"] == suite and "right" in r]
    return rows_digest([[r["row"], r.get("training"), r.get("seed"), r["right"], r.get("curve")] for r in mine])


def plots(results: Path) -> dict[Path, Plot]:
    """Return the figures by their files."""
    done = trials.load(results)
    return {
        results / f"{suite}.png": Plot(digest(done, suite), functools.partial(draw, done, suite))
        for suite in suites(done)
    }


def sections(results: Path) -> list[str]:
    """Return the part of the page in Markdown; nothing without results."""
    done = trials.load(results)
    parts: list[str] = []
    for suite in suites(done):
        parts += [f"### {heading(done, suite)}", table(done, suite), f"![{suite}](results/grpo/{suite}.png)"]
        parts.append(tuning_table(done, suite))
        commands = dict.fromkeys(r["command"] for r in done.values() if r["suite"] == suite)
        parts.append("\n".join(f"    {command}" for command in commands))
    if not parts:
        return []
    about = "Accuracy on the test questions, answered greedily; by seed in brackets. Differences are in points; their "
    about += "intervals are of questions, the same for both, and of seeds (`estimates.py`). `benchmarks/quality/"
    about += "grpo_gsm8k.py` has the protocol; a rate is the best of those that were tried."
    lost = [name for name, r in done.items() if r.get("seed", TUNING_SEED) != TUNING_SEED and "right" not in r]
    ending = [f"Diverged, and their rows left out: {', '.join(lost)}."] if lost else []
    return ["## Reinforcement by small adapters", about, *parts, *ending]


def main() -> int:
    """Print the tables; return the exit status."""
    print("\n\n".join(sections(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
