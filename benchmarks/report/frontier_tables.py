"""The frontier's tables and figures: nats a token against trainable parameters, every method.

python -m benchmarks.report.frontier_tables            print every table
"""

import functools
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import frontier_verdicts
from benchmarks.quality.frontier import RESULTS
from benchmarks.quality.frontier_scores import LEAST_SEEDS, Score, Suite
from benchmarks.quality.frontier_verdicts import Carried, Frontier, Verdict, compare, load
from benchmarks.report.drawing import count_ticks, rows_digest, save
from benchmarks.report.frontier_names import NAMES, heading, label, series
from benchmarks.report.plots import Plot
from lsr_scale.planning.evidence import OURS

COLORS = {
    **{"lora": "black", "lora_xs": "tab:orange", "slora": "tab:green", "inttune": "tab:olive", "vera": "tab:purple"},
    **{"tinylora": "tab:brown", "krona": "tab:cyan", "kron_lora": "tab:blue", "lsr": "tab:red"},
}
LEAST_SPAN = 4.0  # of a figure: its largest number of parameters by its smallest


def score_table(found: Frontier, suite: Suite) -> list[str]:
    """Return a suite's rows in Markdown, at each size the best first."""
    base = found.base(suite)
    lines = [
        "| size | adapter | parameters | nats a token (standard error) | accuracy, % | seeds | rate |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| | none | 0 | {base['nll']:.4f} | {_percent(base['accuracy'])} | | |",
    ]
    for size, group in itertools.groupby(found.of(suite), key=lambda s: s.size):
        for score in sorted(group, key=lambda s: s.nats):
            name = f"**{label(score)}**" if score.is_ours else label(score)
            lines.append(
                f"| {size} | {name} | {score.parameters:,} | {score.nats:.4f} ({score.error:.4f}) | "
                f"{_percent(score.accuracy)} | {_seeds(score)} | {score.rate:g}{' (end)' if score.is_at_end else ''} |"
            )
    return lines


def _seeds(score: Score) -> str:
    worse = score.worse_than_base
    return f"{score.seeds}{f', {worse} of them with more loss than the base' if worse else ''}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def verdict_table(found: Frontier) -> list[str]:
    """Return the comparisons at each size in Markdown."""
    lines = [
        "| model, texts, base | size | best of ours (parameters; seeds) | best of the others (parameters; seeds) | "
        "difference, nats a token (95 %) | p, corrected | | difference in accuracy, points (95 %) |",
        "|---|---|---|---|---:|---:|---|---:|",
    ]
    for one in found.verdicts:
        pair = (one.ours, one.theirs)
        both = " | ".join(f"{label(score)} ({score.parameters:,}; {score.seeds})" for score in pair)
        lines.append(
            f"| {heading(one.ours.suite)} | {one.ours.size} | {both} | {interval(one)} | {chance(one.corrected_p)} | "
            f"{outcome(one)}{_not_compared(found, one)} | {points(one)} |"
        )
    return lines


def _not_compared(found: Frontier, one: Verdict) -> str:
    """Return which rows would have been the best of their side at a comparison's size, had they seeds to compare."""
    rows = [row for row in found.would_be_best(one.ours.suite) if row.size == one.ours.size]
    texts = [
        f"{label(row)}, {'of which a seed diverged' if row.diverged else f'without {LEAST_SEEDS} seeds'}"
        for row in rows
    ]
    return f" (not compared: {'; '.join(texts)})" if texts else ""


def points(one: Verdict) -> str:
    """Return a difference in accuracy with its interval, in points; nothing for texts without choices."""
    if one.accuracy is None:
        return ""
    low, high = one.accuracy.interval
    return f"{100 * one.accuracy.value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def ends_text(rows: Sequence[Score]) -> str:
    """Return over how many rates rows were tuned, and whose best is the first or the last of them; nothing of none."""
    if not rows:
        return ""
    numbers = sorted({len(score.rates) for score in rows})
    most = "one rate" if numbers[-1] == 1 else f"{numbers[-1]} rates"
    text = f"Each row was tuned over {f'{numbers[0]} to ' if len(numbers) > 1 else ''}{most}. "
    names = [f"{label(score)} at {score.size}" for score in rows if score.is_at_end]
    if not names:
        return f"{text}Every best one lies between two others."
    return f"{text}The best is the first or the last of them, and a better one may lie beyond, for {'; '.join(names)}."


def carried_text(rows: list[Carried]) -> str:
    """Return of how many rows rates were carried, and whether that did harm."""
    lost = [one.lost for one in rows if math.isfinite(one.lost)]
    followed, between = sum(one.followed for one in rows), sum(one.is_between for one in rows)
    text = (
        f"{len(rows)} rows were tried first at the best rate of their method at a neighbouring size, or in another "
        f"suite, and the ones beside it. The best was an end for {followed}, where others followed, and lies between "
        f"two others for {between}. The carried rate itself "
    )
    ended = []
    if lost:
        ended.append(
            f"lost {statistics.median(lost):.4f} nats a token against the row's best in the median, {max(lost):.4f} at "
            "most"
        )
    if diverged := len(rows) - len(lost):
        ended.append(f"diverged for {diverged}")
    return f"{text}{'; it '.join(ended)}."


def outcome(one: Verdict) -> str:
    """Return which of the two is the better one, if they separate."""
    return "no separation" if not one.separates else "ours" if one.wins else "the other"


def chance(p: float) -> str:
    """Return a p in a few characters: of far tails no more is known than that they are far."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def interval(one: Verdict) -> str:
    """Return a difference with its interval, in nats a token."""
    low, high = one.estimate.interval
    return f"{one.difference:+.4f} ({low:+.4f} to {high:+.4f})"


def draw(found: Frontier, suite: Suite, path: Path) -> None:
    """Draw a suite against parameters: nats a token, and below it each method's row less LoRA's, on a scale for both.

    Of a method's rows at a size the line has the one that is best where rates are chosen, as the tables do. An open
    marker is a row whose best rate is at an end of those that were tried.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    mine = found.of(suite)
    figure, (losses, differences) = pyplot.subplots(2, 1, figsize=(8, 8.6), sharex=True, height_ratios=(1, 1))
    lora = {s.size: s for s in best_rows([s for s in mine if s.method == "lora"])}
    most = 0.01
    for method in NAMES:
        rows = [score for score in mine if series(score) == method]
        if not rows:
            continue
        best, ours = best_rows(rows), method in OURS
        style = {"color": COLORS[method], "lw": 2.2 if ours else 1.2, "zorder": 4 if ours else 3}
        shape = {"color": COLORS[method], "marker": "s" if ours else "o", "ls": "", "zorder": style["zorder"]}
        bars = {**style, "fmt": "none", "capsize": 3, "elinewidth": 1}
        less = [(s, compare(s, lora[s.size]).estimate) for s in best if s.size in lora and method != "lora"]
        most = max([most, *(abs(one.value) + one.error for _, one in less)])
        for axis, points in (
            (losses, [(s, s.nats, s.error) for s in best]),
            (differences, [(s, one.value, one.error) for s, one in less]),
        ):
            counts, values = [s.parameters for s, _, _ in points], [value for _, value, _ in points]
            axis.plot(counts, values, **style)
            axis.errorbar(counts, values, [error for _, _, error in points], **bars)
            for score, value, _ in points:
                inside = "white" if score.is_at_end else COLORS[method]
                axis.plot(score.parameters, value, ms=6 if ours else 5, markerfacecolor=inside, **shape)
        losses.plot([], [], **{**style, **shape, "ls": "-"}, label=NAMES[method])
        others = [score for score in rows if score not in best]
        losses.plot([s.parameters for s in others], [s.nats for s in others], **shape, ms=3, alpha=0.5)
    differences.axhline(0, color=COLORS["lora"], lw=1.2)
    differences.set_yscale("symlog", linthresh=0.01)  # both 0.01 and 0.3 are to be seen
    ends = [sign * size for sign in (-1, 1) for size in (0.01, 0.03, 0.1, 0.3, 1, 3) if size < 1.3 * most]
    differences.set_ylim(-1.3 * most, 1.3 * most)
    differences.yaxis.set_major_locator(FixedLocator(sorted([0, *ends])))
    differences.yaxis.set_minor_locator(NullLocator())
    differences.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    low, high = min(score.parameters for score in mine), max(score.parameters for score in mine)
    wider = max(1.0, math.sqrt(LEAST_SPAN * low / high))  # rows of one size are not to look far apart
    differences.set_xscale("log")
    if wider > 1:
        differences.set_xlim(low / wider, high * wider)
    count_ticks(differences.xaxis, low / wider, high * wider)
    differences.set_xlabel("trainable parameters (log scale)", fontsize=11)
    differences.set_ylabel("less LoRA of the size, nats a token\n(below 0 better; log scale from 0.01 on)", fontsize=10)
    losses.set_ylabel("held-out loss, nats a token", fontsize=11)
    losses.legend(frameon=False, fontsize=10, ncols=2)
    about = "bars: standard error (above: mostly that of the questions, which all share)\n"
    about += "small points: other forms of a method; open markers: best learning rate at an end of those tried"
    losses.set_title(f"{heading(suite)}\n{about}", fontsize=10)
    for axis in (losses, differences):
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=9)
    figure.tight_layout()
    save(figure, path, digest(found, suite))


def best_rows(rows: list[Score]) -> list[Score]:
    """Return the row of each size that has the lowest loss where rates are chosen."""
    return [min(group, key=lambda s: s.tuned) for _, group in itertools.groupby(rows, key=lambda s: s.size)]


def digest(found: Frontier, suite: Suite) -> str:
    """Return what a suite's figure is recognized by."""
    mine = [r for r in found.done.values() if (r["model"], r["regime"], r["base"]) == suite]
    return rows_digest([[r["row"], r["part"], r.get("size"), r.get("seed"), r.get("rate"), r["nll"]] for r in mine])


def picture(suite: Suite) -> str:
    """Return the name of a suite's figure."""
    return f"{'-'.join(suite)}.png"


def plots(results: Path) -> dict[Path, Plot]:
    """Return the figures by their files."""
    found = load(results)
    return {
        results / picture(suite): Plot(digest(found, suite), functools.partial(draw, found, suite))
        for suite in found.suites
    }


def sections(results: Path) -> list[str]:
    """Return the part of the page in Markdown: its heading, a table a suite, the verdicts; nothing without results."""
    found = load(results)
    parts: list[str] = []
    for suite in found.suites:
        parts += [f"### {heading(suite)}", "\n".join(score_table(found, suite))]
        parts.append(f"![{heading(suite)}](results/frontier/{picture(suite)})")
    if parts:
        about = (frontier_verdicts.__doc__ or "").strip().partition("\n\n")[2]
        parts = ["## Which adapter at which size", about, *parts, "### The best of ours beside the best of the others"]
        parts.append("\n".join(verdict_table(found)))
    parts += [text] if (text := ends_text(found.scores)) else []
    if parts and (rows := frontier_verdicts.carried(found.done)):
        parts.append(carried_text(rows))
    if found.diverged:
        parts.append(f"Diverged, and their rows left out: {', '.join(found.diverged)}.")
    if found.at_other_rates:
        parts.append(
            f"At another rate than the one that is compared, and not counted: {', '.join(found.at_other_rates)}."
        )
    return parts


def main() -> int:
    """Print every table; return the exit status."""
    print("\n\n".join(sections(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
