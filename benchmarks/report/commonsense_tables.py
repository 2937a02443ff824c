"""The accuracy comparison's tables, tests and plot, from the results that `commonsense.py` leaves.

    python -m benchmarks.report.commonsense_tables            print every table

Statistics. Methods are compared on the same examples over common seeds: the mean over tasks of the differences, with a
95 % interval and a two-sided p that know how few the seeds are (`quality/estimates.py`).
An interval that holds zero is "no separation", and so is every comparison where LoRA-8 and LoRA-2 do not separate
(on a quantized base, on which LoRA-2 was not run: where they do not on bf16). Error bars are the standard deviation
over seeds.
"""

import functools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import script_parser
from benchmarks.quality import estimates, trials
from benchmarks.quality.commonsense import RESULTS, mean_accuracy
from benchmarks.quality.commonsense_data import REGIMES
from benchmarks.quality.commonsense_methods import LABELS, PROVIDERS
from benchmarks.quality.estimates import Estimate
from benchmarks.report.drawing import count_ticks, label_points, rows_digest, save
from benchmarks.report.plots import Plot

# README's rows
HEADLINE = ("lora_8", "lsr_4", "lsr_16", "lora_2", "kadaptation", "lora_1", "krona", "kron_lora", "lokr")


def load(results: Path) -> list[dict[str, Any]]:
    """Return all results, by name.

    Raises:
        ValueError: if one is of a trial, which measures nothing.
    """
    loaded = list(trials.load(results).values())
    for result in loaded:
        if "smoke" in result:
            raise ValueError(
                f"{results}: the result of seed {result['seed']}, {result['provider']} is a trial's; remove it"
            )
    return loaded


def seeds_of(all_results: list[dict[str, Any]], regime: str, base: str, provider: str) -> dict[int, dict[str, Any]]:
    """Return the test results of a row by seed."""
    return {
        result["seed"]: result
        for result in all_results
        if (result["regime"], result["base"], result["provider"], result["part"]) == (regime, base, provider, "test")
    }


def compare(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> Estimate | None:
    """Return the difference of the means over tasks in points, over common seeds; None without two of them.

    Raises:
        ValueError: if the two were not scored on the same examples.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    rows: list[list[np.ndarray]] = [[], []]  # of each row a task each: [seeds, examples]
    tasks = list(ours[seeds[0]]["tasks"])
    for task in tasks:
        parts = [[row[seed]["tasks"][task]["after"] for seed in seeds] for row in (ours, theirs)]
        for seed, *pair in zip(seeds, *parts, strict=True):
            if pair[0]["ids_sha256"] != pair[1]["ids_sha256"]:
                raise ValueError(f"{task}, seed {seed}: the two were scored on different examples")
        for row, part in zip(rows, parts, strict=True):
            hits = [np.frombuffer(one["right"].encode(), np.uint8) - ord("0") for one in part]
            row.append(np.stack(hits) * (100 / len(hits[0])))
    # each task weighs the same: the mean over examples of these numbers is the mean over tasks
    scaled = [np.concatenate(row, 1) * (sum(part.shape[1] for part in row) / len(tasks)) for row in rows]
    return estimates.difference(scaled[0], scaled[1], np.ones(scaled[0].shape[1]))


def separate(all_results: list[dict[str, Any]], regime: str) -> bool:
    """Tell whether LoRA-8 and LoRA-2 differ at all: where four times the parameters change nothing, nothing counts."""
    comparison = compare(*(seeds_of(all_results, regime, "bf16", name) for name in ("lora_8", "lora_2")))
    return comparison is not None and comparison.separates


def _versus(row: dict[int, Any], other: dict[int, Any], counts: bool) -> str:
    comparison = compare(row, other) if row is not other else None
    if comparison is None:
        return ""
    low, high = comparison.interval
    words = f"{comparison.value:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{words}, p = {comparison.p:.2g}" if counts and comparison.separates else f"{words}, no separation"


def table(all_results: list[dict[str, Any]], regime: str = "joint", base: str = "bf16") -> str:
    """Return the Markdown table of a regime and base: each row with its seeds' mean, deviation, and paired tests."""
    tasks = REGIMES[regime].tasks
    rows = {name: seeds_of(all_results, regime, base, name) for name in PROVIDERS}
    counts = separate(all_results, regime)
    others = {LABELS[name]: dict.fromkeys(rows, rows[name]) for name in ("lora_8", "lora_2", "lora_1") if rows[name]}
    if base != "bf16":
        others["itself on bf16"] = {name: seeds_of(all_results, regime, "bf16", name) for name in rows}
    head = ["", "parameters", "chosen", "seeds", *tasks, "mean", *(f"against {label}" for label in others)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    before = next(
        (result for row in rows.values() for result in row.values() if "before" in result["tasks"][tasks[0]]), None
    )
    if before:
        cells = [f"{100 * before['tasks'][task]['before']['accuracy']:.1f}" for task in tasks]
        cells += [f"{mean_accuracy(before, 'before'):.2f}", *("" for _ in others)]
        lines.append("| " + " | ".join(["zero-shot", "0", "", "", *cells]) + " |")
    for name, row in rows.items():
        if not row:
            continue
        some = next(iter(row.values()))
        cells = [
            f"{100 * statistics.fmean(r['tasks'][task]['after']['accuracy'] for r in row.values()):.1f}"
            for task in tasks
        ]
        means = [mean_accuracy(result) for result in row.values()]
        spread = f" +- {statistics.stdev(means):.2f}" if len(means) > 1 else ""
        chosen = ", ".join(f"{key} {value:g}" for key, value in some["settings"].items())
        tests = [_versus(row, other[name], counts) for other in others.values()]
        start_of = [
            LABELS[name],
            f"{some['trainable_parameters']:,}",
            chosen.replace("learning_rate", "lr"),
            str(len(row)),
        ]
        lines.append("| " + " | ".join([*start_of, *cells, f"{statistics.fmean(means):.2f}{spread}", *tests]) + " |")
    return "\n".join(lines)


def short_table(all_results: list[dict[str, Any]], shown: Iterable[str] = tuple(PROVIDERS)) -> str:
    """Return a Markdown table of the joint regime on bf16: the means of some rows, the best first."""
    counts = separate(all_results, "joint")
    rows = {name: seeds_of(all_results, "joint", "bf16", name) for name in PROVIDERS}
    lines = ["| | parameters | mean of 5 tasks, % | over LoRA r=8 | over LoRA r=2 |", "|---|---:|---:|---:|---:|"]
    for name, row in sorted(rows.items(), key=lambda pair: -_mean(pair[1]) if pair[1] else 0.0):
        if row and name in shown:
            spread = statistics.stdev(mean_accuracy(result) for result in row.values()) if len(row) > 1 else 0.0
            tests = [_versus(row, rows[other], counts) for other in ("lora_8", "lora_2")]
            parameters = next(iter(row.values()))["trainable_parameters"]
            cells = [LABELS[name], f"{parameters:,}", f"{_mean(row):.2f} +- {spread:.2f}", *tests]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(row: dict[int, dict[str, Any]]) -> float:
    return statistics.fmean(mean_accuracy(result) for result in row.values())


def tuning_table(all_results: list[dict[str, Any]], regime: str = "joint") -> str:
    """Return the Markdown table of the development set's means by point, where all points of a row were run."""
    lines = []
    for name, provider in PROVIDERS.items():
        own = [r for r in all_results if (r["regime"], r["provider"], r["part"]) == (regime, name, "dev")]
        # a result of a point that is another one by now is none
        tuned = {
            i: r for i, point in enumerate(provider.points) for r in own if (r["point"], r["settings"]) == (i, point)
        }
        if len(tuned) < len(provider.points):
            continue
        means = {index: mean_accuracy(result) for index, result in tuned.items()}
        best = max(means, key=lambda index: means[index])
        cells = []
        for index, mean in sorted(means.items(), key=lambda item: list(tuned[item[0]]["settings"].values())[::-1]):
            point = ", ".join(f"{value:g}" for value in tuned[index]["settings"].values())
            cells.append(f"**{mean:.2f}** ({point})" if index == best else f"{mean:.2f} ({point})")
        lines.append("| " + " | ".join([LABELS[name], *cells]) + " |")
    most = max(line.count("|") for line in lines) - 2 if lines else 0
    return "\n".join(["|" + " |" * (most + 1), "|---|" + "---:|" * most, *lines])


def rounded_table(all_results: list[dict[str, Any]]) -> str:
    """Return the Markdown table of what rounding the factors to 8 and 4 bits loses, over the seeds that have it."""
    lines = ["| | seeds | bytes, 8 bits | loses, points | bytes, 4 bits | loses, points |", "|---|" + "---:|" * 5]
    for name in PROVIDERS:
        row = [r for r in seeds_of(all_results, "joint", "bf16", name).values() if "rounded" in r]
        cells = [LABELS[name], str(len(row))]
        for bits in ("8", "4"):
            lost = [mean_accuracy(r) - mean_accuracy(r, bits=bits) for r in row]
            if lost:
                spread = f" +- {statistics.stdev(lost):.2f}" if len(lost) > 1 else ""
                cells += [f"{row[0]['rounded'][bits]['bytes']:,}", f"{statistics.fmean(lost):.2f}{spread}"]
        if row:
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(all_results: list[dict[str, Any]], path: Path, regime: str = "joint", base: str = "bf16") -> None:
    """Draw the mean accuracy against trainable parameters; bars are the standard deviation over seeds."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    points: dict[str, list[tuple[int, float, float, str]]] = {}
    labels: list[tuple[float, float, str, Any]] = []
    for name in PROVIDERS:
        row = seeds_of(all_results, regime, base, name)
        if row:
            means = [mean_accuracy(result) for result in row.values()]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            parameters = next(iter(row.values()))["trainable_parameters"]
            method, _, setting = LABELS[name].replace("*", "").replace(",", "").partition(" ")
            points.setdefault(method, []).append((parameters, statistics.fmean(means), spread, setting))
    for method, of_method in points.items():
        sizes, means, spreads, settings = zip(*sorted(of_method), strict=True)
        line = "-" if method == "LoRA" else ""  # what the others are to be above
        bars = axis.errorbar(sizes, means, spreads, fmt="o", ls=line, lw=1.5, elinewidth=1, capsize=3, label=method)
        for size, mean, setting in zip(sizes, means, settings, strict=True):
            options = " ".join(word for word in setting.split() if "=" in word)
            labels.append((size, mean, options, bars.lines[0].get_color()))
    tasks = REGIMES[regime].tasks
    axis.set_xscale("log")
    count_ticks(axis.xaxis, *(choose(size for size, *_ in labels) for choose in (min, max)))
    axis.set_xlabel("trainable parameters (log scale)")
    axis.set_ylabel(f"mean accuracy of {len(tasks)} tasks, %" if len(tasks) > 1 else "accuracy, %")
    axis.grid(alpha=0.3)
    axis.margins(x=0.08, y=0.06)
    heading = "bars: standard deviation over seeds"
    axis.legend(frameon=False, fontsize=8, title=heading, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    trained_on = "five tasks at once" if regime == "joint" else ", ".join(tasks)
    axis.set_title(f"SmolLM2-135M held in {base}, trained on {trained_on}", fontsize=11)
    figure.tight_layout()
    label_points(axis, labels)
    save(figure, path, digest(all_results))


def sections(results: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Return, by the stem of its plot, the table of each regime and base that was measured, and its results."""
    everything, tables = load(results), {}
    for regime, base in dict.fromkeys((result["regime"], result["base"]) for result in everything):
        some = [r for r in everything if (r["regime"], r["base"], r["part"]) == (regime, base, "test")]
        if some:
            tables[f"{regime}-{base}"] = table(everything, regime, base), some
    return tables


def digest(results: list[dict[str, Any]]) -> str:
    """Return what a plot of these results is recognized by."""
    return rows_digest([[r["provider"], r["seed"], mean_accuracy(r), r["trainable_parameters"]] for r in results])


def plots(results: Path) -> dict[Path, Plot]:
    """Return a plot for each regime and base by its file, beside the results."""
    plots_by_file: dict[Path, Plot] = {}
    for stem, (_, some) in sections(results).items():
        regime, base = stem.rsplit("-", 1)
        plots_by_file[results / f"{stem}.png"] = Plot(
            digest(some), functools.partial(draw, some, regime=regime, base=base)
        )
    return plots_by_file


def main() -> int:
    """Print the tables."""
    script_parser(__doc__).parse_args()
    for stem, (text, _) in sections(RESULTS).items():
        print(f"{stem}\n\n{text}\n")
    everything = load(RESULTS)
    print(f"development set, by point\n\n{tuning_table(everything)}\n")
    print(f"factors rounded\n\n{rounded_table(everything)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
