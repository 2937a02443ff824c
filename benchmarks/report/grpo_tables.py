"""What `quality/grpo_gsm8k.py` found: accuracy by adapter, GRPO beside SFT, and the rewards while it trained.

python -m benchmarks.report.grpo_tables                 print the tables
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import trials
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.frontier_rows import MODEL_NAMES, AdapterRow
from benchmarks.quality.grpo_gsm8k import MOST_BEYOND, RESULTS
from benchmarks.quality.grpo_rows import LAST, RATES, REFERENCE, ROWS, TRAININGS
from benchmarks.quality.grpo_verdicts import (
    FALLEN,
    SMALL,
    WITHIN,
    Results,
    Score,
    Verdict,
    all_suites,
    answer,
    chosen,
    diverged,
    of_row,
    over_base,
    reference_parameters,
    scores,
    suites,
    verdicts,
)
from benchmarks.quality.rate_trials import is_at_end, rates_left, tried
from benchmarks.report.drawing import card, count_ticks, label_points, rows_digest, save
from benchmarks.report.frontier_names import NAMES, listed
from benchmarks.report.frontier_tables import COLORS
from benchmarks.report.markdown import grid, number
from benchmarks.report.plots import Plot
from lsr_scale.planning.evidence import OURS

SMOOTHED = 5  # steps
TRAINING_NAMES = {"grpo": "GRPO", "sft": "SFT"}
OUTCOMES = {
    "within": "within a point",
    "below": "more than a point below",
    "above": "more than a point above",
    "undecided": "undecided",
}


def label(row: str) -> str:
    """Return what a row is called."""
    adapter: AdapterRow = ROWS[row]
    options = dict(adapter.options)
    words = [f"r={options['rank']}"]
    words += [f"s={options['separation_rank']}"] if "separation_rank" in options else []
    words += [f"({options['left_in']}, {options['left_out']})"] if "left_in" in options else []
    words += [f"u={options['u']}"] if "u" in options else []
    if "target_modules" in options:
        words.append("on " + listed([name.removesuffix("_proj") for name in options["target_modules"]]))
    return " ".join([NAMES[adapter.method], *words])


def bold(row: str) -> str:
    """Return what a row is called, in bold where the method is this package's."""
    return f"**{label(row)}**" if ROWS[row].method in OURS else label(row)


def accuracies_of(done: Results, suite: str) -> dict[tuple[str, str], Score]:
    """Return a suite's scores by training and row."""
    return {(score.training, score.row): score for score in scores(done, suite)}


def by_size(found: Mapping[tuple[str, str], Score]) -> list[str]:
    """Return the rows that have a score by either training, the smallest first."""
    parameters = {row: score.parameters for (_, row), score in found.items()}
    return sorted(parameters, key=lambda row: parameters[row])


def table(done: Results, suite: str) -> str:
    """Return a suite's accuracies, the smallest adapter first: either training, less LoRA r=8, and GRPO less SFT."""
    found = accuracies_of(done, suite)
    verdict_of = {one.ours.row: one for one in verdicts(done, suite)}
    base = done.get(f"{suite}-base", {}).get("accuracy")
    reference = reference_parameters(done, suite)
    body = [["no adapter", "0", "", *[number(base and 100 * base, ".1f"), ""] * 2, "", ""]]
    for row in by_size(found):
        grpo, sft = (found.get((training, row)) for training in TRAININGS)
        parameters = next(score.parameters for score in (grpo, sft) if score is not None)
        cells = [bold(row), f"{parameters:,}", "" if reference is None else f"{100 * parameters / reference:.1f}"]
        for score in (grpo, sft):
            cells.append("" if score is None else accuracy_cell(score))
            cells.append("" if score is None else over_cell(score, found.get((score.training, REFERENCE))))
        cells.append("" if grpo is None else over_cell(grpo, sft))
        cells.append(OUTCOMES[verdict_of[row].outcome] if row in verdict_of else "")
        body.append(cells)
    head = ["adapter", "parameters", "% of LoRA r=8's", "GRPO, %", "less LoRA r=8 (95 %)", "SFT, %"]
    head += ["less LoRA r=8 (95 %)", "GRPO less SFT (95 %)", "by GRPO, beside LoRA r=8"]
    return grid(head, body)


def training_table(done: Results, suite: str) -> str:
    """Return how a suite's rows were trained: seeds, rates, time, and how long and how often cut completions were."""
    found = accuracies_of(done, suite)
    body = []
    for row in by_size(found):
        both = [found.get((training, row)) for training in TRAININGS]
        cells = [label(row), *("" if score is None else str(score.seeds) for score in both)]
        cells += ["" if score is None else rate_cell(score) for score in both]
        grpo = both[0]
        cells.append("" if grpo is None else f"{statistics.fmean(step_seconds(grpo)):.1f}")
        cells.append("" if grpo is None else ", ".join(f"{reward:.3f}" for reward in grpo.rewards))
        cells.append("" if grpo is None else lengths(grpo))
        cut = None if grpo is None else grpo.mean_of("cut")
        cells.append(number(None if cut is None else 100 * cut, ".1f"))
        body.append(cells)
    head = ["adapter", "seeds, GRPO", "seeds, SFT", "rate, GRPO", "rate, SFT", "s a step, GRPO"]
    head.append(f"reward of {LAST} steps, highest and last")
    return grid([*head, f"tokens a completion, first and last {LAST} steps", "completions cut, all steps, %"], body)


def lengths(score: Score) -> str:
    """Return the mean length of completions at first and at the end, and the longest; nothing where it was not kept."""
    ends = score.mean_of("tokens", slice(LAST)), score.mean_of("tokens", slice(-LAST, None))
    return "" if None in ends else f"{ends[0]:.0f} to {ends[1]:.0f} of {score.results[0]['new_tokens']}"


def tuning_table(done: Results, suite: str) -> str:
    """Return what each rate reached in tuning, the chosen one in bold; nothing where none was tried."""
    body = []
    for row in ROWS:
        cells = []
        for training in TRAININGS:
            of_rates = tried(of_row(done, suite, training, row)[0])
            best = chosen(of_rates)
            shown = {
                rate: f"{rate:g}: {'diverged' if lost == float('inf') else format(abs(lost), '.3f')}"
                for rate, lost in sorted(of_rates.items())
            }
            end = " (end)" if best is not None and is_at_end(best, of_rates) else ""
            cells.append(", ".join(f"**{text}**{end}" if rate == best else text for rate, text in shown.items()))
        if any(cells):
            body.append([label(row), *cells])
    head = ["tuning, by rate", f"mean reward of the last {LAST} steps, GRPO", "mean loss of them, SFT"]
    return grid(head, body) if body else ""


def accuracy_cell(score: Score) -> str:
    """Return a score in percent, and in brackets that of each seed."""
    by_seed = 100 * score.right.mean(1)
    spread = f" ({', '.join(f'{one:.1f}' for one in by_seed)})" if len(by_seed) > 1 else ""
    return f"{100 * score.accuracy.value:.1f}{spread}"


def over_cell(score: Score, other: Score | None) -> str:
    """Return how far a score is above another of the same questions; nothing for itself and without the other."""
    return "" if other is None or score is other else points(score.over(other))


def points(estimate: Estimate) -> str:
    """Return a difference in points with its interval."""
    low, high = (100 * end for end in estimate.interval)
    return f"{100 * estimate.value:+.1f} ({low:+.1f} to {high:+.1f})"


def rate_cell(score: Score) -> str:
    """Return the rate that a row's seeds were trained at, and whether it is an end of those that were tried."""
    return ", ".join(f"{rate:g}" for rate in score.rates) + (" (end)" if score.is_at_end else "")


def step_seconds(score: Score) -> list[float]:
    """Return the seconds of a step of each seed, the mean over its run."""
    return [result["curve"]["s"][-1] / len(result["curve"]["s"]) for result in score.results]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each step and those before it, `SMOOTHED` in all."""
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def mean_curve(score: Score, name: str) -> list[float]:
    """Return a curve, the mean over seeds, as far as all have it."""
    return [statistics.fmean(values) for values in zip(*(r["curve"][name] for r in score.results), strict=False)]


def verdict_text(done: Results, suite: str) -> str:
    """Return the answer to the question: is LSR-Adapt with so few parameters within a point of LoRA r=8 by GRPO?"""
    one = answer(verdicts(done, suite))
    few = f"{100 * SMALL:.0f} % of LoRA r=8's parameters or fewer"
    if one is None:
        has_reference = ("grpo", REFERENCE) in accuracies_of(done, suite)
        what = "Such a row" if has_reference else "LoRA r=8"
        return (
            f"Whether LSR-Adapt with {few} is within a point of LoRA r=8 by GRPO is not known: {what} has no accuracy."
        )
    return (
        f"Of LSR-Adapt with {few} the row that did best in tuning is {label(one.ours.row)}, with {100 * one.share:.1f} "
        f"%. By GRPO {outcome_words(one)}: {points(one.estimate)} points{seeds_known(one)}. {learned_text(done, one)}"
    ).rstrip()


def outcome_words(one: Verdict) -> str:
    """Return a verdict's outcome as a clause."""
    if one.outcome == "undecided":
        return "it is undecided whether it is within a point of LoRA r=8"
    return f"it is {OUTCOMES[one.outcome]} {'of ' if one.outcome == 'within' else ''}LoRA r=8"


def learned_text(done: Results, one: Verdict) -> str:
    """Return how far above no adapter LoRA r=8 is; where that does not separate, being near it says little."""
    over = over_base(done, one.reference)
    if over is None:
        return ""
    text = f"LoRA r=8 itself is {points(over)} points over no adapter"
    if over.separates:
        return f"{text}."
    says = "" if one.outcome == "below" else ", so that being near LoRA r=8 says little"
    return f"{text}, which does not separate{says}."


def seeds_known(one: Verdict) -> str:
    """Return that the spread of seeds is not in an interval, where it is not."""
    return "" if one.knows_seeds else " (of one seed: how far seeds spread is not in it)"


def seeds_text(found: Sequence[Score]) -> str:
    """Return of which rows there is one seed, whose spread no interval knows; nothing where all have more."""
    single = [f"{label(s.row)} by {TRAINING_NAMES[s.training]}" for s in found if s.seeds == 1]
    if not single:
        return ""
    rows = "Every row has one seed" if len(single) == len(found) else f"Of {'; '.join(single)} there is one seed"
    return f"{rows}: how far seeds spread is not in those intervals, which are of questions alone and too narrow."


def missing_text(done: Results, suite: str) -> str:
    """Return which rows have no score, and why; nothing where all have."""
    found = accuracies_of(done, suite)
    reasons: dict[str, dict[str, list[str]]] = {}
    for row, training in itertools.product(ROWS, TRAININGS):
        if (training, row) not in found:
            reason = reason_of(done, suite, training, row)
            reasons.setdefault(reason, {}).setdefault(label(row), []).append(TRAINING_NAMES[training])
    texts = []
    for reason, rows in reasons.items():
        names = [name + (f" by {of[0]}" if len(of) == 1 else "") for name, of in rows.items()]
        texts.append(f"{reason}: {'; '.join(names)}.")
    return " ".join(texts)


def reason_of(done: Results, suite: str, training: str, row: str) -> str:
    """Return why a row has no score by a training."""
    base = next(result["base"] for result in done.values() if result["suite"] == suite)
    if not ROWS[row].takes(base):
        return f"Not run, as PEFT's TinyLoRA takes no base in {base.upper()}"
    tuning, seeds = of_row(done, suite, training, row)
    if seeds:
        return "Left out, as a seed diverged"
    if not tuning:
        return "Not run"
    of_rates = tried(tuning)
    if rates_left(RATES[training][row], of_rates, MOST_BEYOND):
        return "Not tuned to the end"
    return "Diverged at every rate" if chosen(of_rates) is None else "Tuned, but no seed was run"


def ends_text(found: Sequence[Score]) -> str:
    """Return whose best rate is the first or the last of those that were tried; nothing without rows."""
    if not found:
        return ""
    names = [f"{label(s.row)} by {TRAINING_NAMES[s.training]}" for s in found if s.is_at_end]
    if not names:
        return "Every best rate lies between two others."
    whose = "; ".join(names)
    return f"The best rate is the first or the last that was tried, and a better one may lie beyond, for {whose}."


def fell_text(found: Sequence[Score]) -> str:
    """Return of which rows the reward had fallen by the end, which their tuning did not see; nothing of none."""
    fallen = [score for score in found if score.training == "grpo" and score.fell]
    if not fallen:
        return ""
    words = [f"{label(score.row)} (from {score.rewards[0]:.2f} to {score.rewards[1]:.2f})" for score in fallen]
    tuning, steps = (fallen[0].results[0][name] for name in ("tuning_steps", "steps"))
    text = f"By the end the reward had fallen by more than {100 * FALLEN:.0f} % of its highest for {listed(words)}"
    return f"{text}: a rate chosen after {tuning} steps may be too high for {steps}." if tuning < steps else f"{text}."


def cut_text(found: Sequence[Score]) -> str:
    """Return that the share of completions that were cut is not known, where it was not kept."""
    grpo = [score for score in found if score.training == "grpo"]
    unknown = [label(score.row) for score in grpo if score.mean_of("cut") is None]
    if not unknown:
        return ""
    whose = "" if len(unknown) == len(grpo) else f" for {', '.join(unknown)}"
    return f"The share of completions that were cut at the longest length was not kept{whose}."


def draw(done: Results, suite: str, path: Path) -> None:
    """Draw accuracy against parameters, GRPO and SFT, and below it GRPO's reward against steps and against seconds.

    An open marker is a row whose best rate is at an end of those that were tried, as in the frontier's figure.
    """
    from matplotlib import pyplot

    found = accuracies_of(done, suite)
    grpo = sorted((score for score in found.values() if score.training == "grpo"), key=lambda one: one.parameters)
    figure = pyplot.figure(figsize=(9, 9.5 if grpo else 5))
    sizes = figure.subplot_mosaic("AA\nBC" if grpo else "A", height_ratios=(1.35, 1) if grpo else (1,))
    draw_sizes(sizes["A"], done, suite)
    for place, name, text in (("B", None, "step"), ("C", "s", f"seconds of training, {side_by_side(grpo)}")):
        for score in grpo:
            reward = smoothed(mean_curve(score, "reward"))
            across = range(1, len(reward) + 1) if name is None else mean_curve(score, name)
            sizes[place].plot(across, reward, label=label(score.row), **line_style(score.row))
        if grpo:
            sizes[place].set_xlabel(text, fontsize=10)
            sizes[place].set_ylabel(f"reward: right completions\n(mean of {SMOOTHED} steps)", fontsize=10)
    if grpo:  # of both, below them: curves are anywhere in their axes
        figure.legend(*sizes["B"].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    for axis in sizes.values():
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=9)
    figure.tight_layout(rect=(0, 0.03 * -(-len(grpo) // 3), 1, 1))
    write_labels(sizes["A"], found)
    save(figure, path, digest(done, suite))


def draw_sizes(axis: Any, done: Results, suite: str) -> None:
    """Draw a suite's accuracies against parameters: each training's rows, with LoRA r=8's line and a point around."""
    found = accuracies_of(done, suite)
    counts = [score.parameters for score in found.values()]
    for training, dashes in (("sft", "--"), ("grpo", "-")):
        for method in NAMES:
            rows = [score for (of, row), score in found.items() if of == training and ROWS[row].method == method]
            line = sorted((score.parameters, 100 * score.accuracy.value) for score in rows)
            style = {"color": COLORS[method], "zorder": 4 if training == "grpo" else 3}
            axis.plot(*zip(*line, strict=True) if line else ([], []), ls=dashes, lw=1.2, **style)
            for score in rows:
                value, error = 100 * score.accuracy.value, 100 * score.accuracy.error
                axis.errorbar(score.parameters, value, error, fmt="none", capsize=3, elinewidth=1, **style)
                face = "white" if score.is_at_end else COLORS[method]
                axis.plot(score.parameters, value, marker_of(training), ms=7, markerfacecolor=face, **style)
        if any(of == training for of, _ in found):
            gray = {"color": "gray", "ls": dashes, "lw": 1.2, "marker": marker_of(training)}
            axis.plot([], [], label=TRAINING_NAMES[training], **gray)
    low, high = axis.get_ylim()
    low, high = low - 0.2 * (high - low), high + 0.05 * (high - low)  # below is room for the legend
    across = (min(counts) / 2, max(counts) * 2)
    thin = {"color": "gray", "lw": 1, "zorder": 1}
    reference = found.get(("grpo", REFERENCE))
    if reference is not None:  # lines of data, not of the axes, so that labels keep off them
        value = 100 * reference.accuracy.value
        axis.plot(across, (value, value), **{**thin, "color": COLORS["lora"]})
        name = f"LoRA r=8 by GRPO, {100 * WITHIN:.0f} point around"
        axis.axhspan(value - 100 * WITHIN, value + 100 * WITHIN, color="gray", alpha=0.2, lw=0, label=name, zorder=0)
        name = f"{100 * SMALL:.0f} % of LoRA r=8's parameters"
        axis.plot([SMALL * reference.parameters] * 2, (low, high), ls="-.", label=name, **thin)
    base = done.get(f"{suite}-base", {}).get("accuracy")
    if base is not None:
        axis.plot(across, (100 * base, 100 * base), ls=":", label="no adapter", **thin)
    axis.set_xscale("log")
    axis.set_xlim(*across)
    axis.set_ylim(low, high)
    count_ticks(axis.xaxis, min(counts), max(counts))
    axis.set_xlabel("trainable parameters (log scale)", fontsize=11)
    axis.set_ylabel("test questions right, %", fontsize=11)
    axis.legend(fontsize=9, ncols=2, loc="lower center", edgecolor="none")
    about = "bars: standard error (mostly that of the questions, which all share)\n"
    about += "open markers: best learning rate at an end of those tried"
    axis.set_title(f"{heading(done, suite).replace(': ', chr(10))}\n{about}", fontsize=10)


def write_labels(axis: Any, found: Mapping[tuple[str, str], Score]) -> None:
    """Write each row's name once, beside what it reached by GRPO, or by SFT where that is all there is."""
    shown = [found.get(("grpo", row)) or found["sft", row] for row in by_size(found)]
    places = [(s.parameters, 100 * s.accuracy.value, label(s.row), COLORS[ROWS[s.row].method]) for s in shown]
    label_points(axis, places, fontsize=9)


def marker_of(training: str) -> str:
    """Return a training's marker."""
    return "s" if training == "grpo" else "v"


def line_style(row: str) -> dict[str, Any]:
    """Return how a row's rewards are drawn: in its method's colour, each of the method's rows in dashes of its own."""
    method = ROWS[row].method
    place = [name for name in ROWS if ROWS[name].method == method].index(row)
    ours = method in OURS
    return {
        "color": COLORS[method],
        "ls": ("-", "--", ":")[place],
        "lw": 2 if ours else 1.3,
        "zorder": 4 if ours else 3,
    }


def side_by_side(found: Sequence[Score]) -> str:
    """Return how many runs shared the device."""
    jobs = max((r["jobs"] for score in found for r in score.results), default=1)
    return f"up to {jobs} runs side by side" if jobs > 1 else "one run at a time"


def heading(done: Results, suite: str) -> str:
    """Return what a suite is called."""
    first = next(result for result in done.values() if result["suite"] == suite)
    base = "bf16" if first["base"] == "none" else first["base"].upper()
    size = f"{first['steps']} steps of {first['prompts']} prompts x {first['completions']} completions"
    size += ", a rate that falls to zero" if first.get("schedule") == "linear" else ""
    return f"{MODEL_NAMES.get(first['model'], first['model'])}, {base} base, GSM8K: {size}, one {card(first['env'])}"


def digest(done: Results, suite: str) -> str:
    """Return what a suite's figure is recognized by."""
    names = ("row", "training", "seed", "rate", "score", "right", "curve")
    return rows_digest([[r.get(name) for name in names] for r in done.values() if r["suite"] == suite])


def plots(results: Path) -> dict[Path, Plot]:
    """Return the figures by their files."""
    done = trials.load(results)
    return {
        results / picture(suite): Plot(digest(done, suite), functools.partial(draw, done, suite))
        for suite in suites(done)
    }


def picture(suite: str) -> str:
    """Return the name of a suite's figure."""
    return f"{suite}.png"


def sections(results: Path) -> list[str]:
    """Return the part of the page in Markdown; nothing without results."""
    done = trials.load(results)
    parts: list[str] = []
    for suite in all_suites(done):
        parts.append(f"### {heading(done, suite)}")
        if found := scores(done, suite):
            parts += [verdict_text(done, suite), table(done, suite), f"![{suite}](results/grpo/{picture(suite)})"]
            notes = [fell_text(found), seeds_text(found), ends_text(found), cut_text(found)]
            parts += [training_table(done, suite), " ".join(note for note in notes if note)]
        parts += [text for text in (missing_text(done, suite), tuning_table(done, suite)) if text]
        if lost := diverged(done, suite):
            parts.append(f"Diverged, and their rows left out: {', '.join(lost)}.")
        commands = dict.fromkeys(r["command"] for r in done.values() if r["suite"] == suite)
        parts.append("\n".join(f"    {command}" for command in commands))
    if not parts:
        return []
    about = "Accuracy on the test questions, answered greedily; by seed in brackets. Differences are in points; their "
    about += "intervals are of questions, the same for both, and of seeds (`estimates.py`), and are not corrected for "
    about += f"how many there are. Beside LoRA r=8 stands where the interval of a row with {100 * SMALL:.0f} % of its "
    about += "parameters or fewer lies: within a point to either side, beyond, or across an end of that (undecided). A "
    about += "step's seconds are those of runs side by side; a rate is the best of those that were tried. "
    about += "`benchmarks/quality/grpo_gsm8k.py` has the protocol."
    return ["## Reinforcement by small adapters", about, *parts]


def main() -> int:
    """Print the tables; return the exit status."""
    print("\n\n".join(sections(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
