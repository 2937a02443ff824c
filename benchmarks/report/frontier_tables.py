"""The frontier's tables and figures: nats a token against trainable parameters, every method.

python -m benchmarks.report.frontier_tables            print every table
"""

import functools
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality import frontier_verdicts as verdicts
from benchmarks.quality import trials
from benchmarks.quality.frontier import RESULTS
from benchmarks.quality.frontier_rows import OURS
from benchmarks.report.drawing import count_ticks, rows_digest, save
from benchmarks.report.plots import Plot

NAMES = {
    "lora": "LoRA",
    "lora_xs": "LoRA-XS",
    "slora": "SLoRA",
    "inttune": "IntTune",
    "vera": "VeRA",
    "tinylora": "TinyLoRA",
    "krona": "KronA",
    "kron_lora": "Kron-LoRA",
    "lsr": "LSR-Adapt",
}
VARIANT_NAMES = {
    "gradient": "from the gradient",
    "rite": "by LoRA-RITE",
    "pro": "by LoRA-Pro",
    "plus": "by LoRA+",
    "gradient_rite": "from the gradient, by LoRA-RITE",
}
MODEL_NAMES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
REGIME_NAMES = {"commonsense": "five commonsense tasks", "gsm8k": "GSM8K's solutions"}
Results = Mapping[str, dict[str, Any]]


def series(score: verdicts.Score) -> str:
    """Return the line of the figure that a row belongs to: its method, SLoRA's IntTune by itself."""
    return "inttune" if score.options.get("train") == "middle" else score.method


def label(score: verdicts.Score) -> str:
    """Return what a row is called: its method, size and where it is."""
    options = dict(score.options)
    words = [f"r={options['rank']}"] if "rank" in options else []
    if "separation_rank" in options:
        words.append(f"s={options['separation_rank']}")
    if "left_in" in options:
        words.append(f"({options['left_in']}, {options['left_out']})")
    if "target_modules" in options:
        words.append("on " + ", ".join(name.removesuffix("_proj") for name in options["target_modules"]))
    if "layers_to_transform" in options:
        words.append(f"in the last {len(options['layers_to_transform'])} layers")
    variant = score.row.partition("+")[2]
    return " ".join([NAMES[series(score)], *words, *([VARIANT_NAMES[variant]] if variant else [])])


def heading(suite: tuple[str, str, str]) -> str:
    """Return what a suite is called."""
    model, regime, base = suite
    return f"{MODEL_NAMES[model]}, {REGIME_NAMES[regime]}, base in {'bf16' if base == 'none' else base}"


def score_table(done: Results, suite: tuple[str, str, str]) -> list[str]:
    """Return a suite's rows in Markdown, at each size the best first."""
    tokens = verdicts.answer_tokens(done, suite)
    base = done["-".join(suite) + "-base-test"]
    lines = [
        "| size | adapter | parameters | nats a token (standard error) | accuracy, % | seeds | rate |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| | none | 0 | {base['nll']:.4f} | {_percent(base['accuracy'])} | | |",
    ]
    mine = [score for score in verdicts.scores(done) if score.suite == suite]
    for size, group in itertools.groupby(mine, key=lambda s: s.size):
        measured = [(verdicts.mean_and_error(score, tokens), score) for score in group]
        for (mean, error), score in sorted(measured, key=lambda pair: pair[0][0]):
            name = f"**{label(score)}**" if score.method in OURS else label(score)
            lines.append(
                f"| {size} | {name} | {score.parameters:,} | {mean:.4f} ({error:.4f}) | {_percent(score.accuracy)} | "
                f"{len(score.losses)} | {score.rate:g} |"
            )
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def verdict_table(done: Results) -> list[str]:
    """Return the comparisons at each size in Markdown."""
    lines = [
        "| model, texts, base | size | best of ours | best of the others | difference, nats a token (95 %) | "
        "p, corrected | |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for one in verdicts.verdicts(done):
        separated = "no separation" if one.corrected_p >= 0.05 else "ours" if one.difference < 0 else "the other"
        lines.append(
            f"| {heading(one.ours.suite)} | {one.ours.size} | {label(one.ours)} | {label(one.theirs)} | "
            f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f}) | {one.corrected_p:.2g} | {separated} |"
        )
    return lines


def draw(done: Results, suite: tuple[str, str, str], path: Path) -> None:
    """Draw a suite: nats a token against parameters, a line a method through its best row at each size."""
    from matplotlib import pyplot

    tokens = verdicts.answer_tokens(done, suite)
    mine = [score for score in verdicts.scores(done) if score.suite == suite]
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for method in NAMES:
        rows = [(s.parameters, *verdicts.mean_and_error(s, tokens), s.size) for s in mine if series(s) == method]
        if not rows:
            continue
        color = f"C{list(NAMES).index(method)}"
        marker = "s" if method in OURS else "o"
        best = [min(of_size, key=lambda row: row[1]) for _, of_size in itertools.groupby(rows, key=lambda row: row[3])]
        axis.plot(*zip(*[row[:2] for row in best], strict=True), color=color, lw=2 if method in OURS else 1.2)
        sizes, means, errors, _ = zip(*rows, strict=True)
        axis.errorbar(
            sizes, means, errors, fmt=marker, ms=5, ls="", color=color, elinewidth=1, capsize=3, label=NAMES[method]
        )
    counts = [score.parameters for score in mine]
    axis.set_xscale("log")
    count_ticks(axis.xaxis, min(counts), max(counts))
    axis.set_xlabel("trainable parameters (log scale)")
    axis.set_ylabel("held-out loss of the right answers, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, title="bars: standard error over questions and seeds", title_fontsize=8)
    axis.set_title(heading(suite), fontsize=11)
    figure.tight_layout()
    save(figure, path, digest(done, suite))


def digest(done: Results, suite: tuple[str, str, str]) -> str:
    """Return what a suite's figure is recognized by."""
    tests = [r for r in done.values() if (r["model"], r["regime"], r["base"]) == suite and r["part"] == "test"]
    return rows_digest([[r["row"], r.get("size"), r.get("seed"), r["nll"]] for r in tests])


def suites(done: Results) -> list[tuple[str, str, str]]:
    """Return the suites that have a row on the test part."""
    return list(dict.fromkeys(score.suite for score in verdicts.scores(done)))


def plots(results: Path) -> dict[Path, Plot]:
    """Return the figures by their files."""
    done = trials.load(results)
    return {
        results / f"{'-'.join(suite)}.png": Plot(digest(done, suite), functools.partial(draw, done, suite))
        for suite in suites(done)
    }


def sections(results: Path) -> list[str]:
    """Return the part of the page in Markdown: its heading, a table a suite, the verdicts; nothing without results."""
    done = trials.load(results)
    parts: list[str] = []
    for suite in suites(done):
        parts += [f"### {heading(suite)}", "\n".join(score_table(done, suite))]
        parts.append(f"![{heading(suite)}](results/frontier/{'-'.join(suite)}.png)")
    if parts:
        about = (verdicts.__doc__ or "").strip().partition("\n\n")[2]
        parts = ["## Which adapter at which size", about, *parts, "### The best of ours beside the best of the others"]
        parts.append("\n".join(verdict_table(done)))
    if names := verdicts.diverged(done):
        parts.append(f"Diverged, and their rows left out: {', '.join(names)}.")
    return parts


def main() -> int:
    """Print every table; return the exit status."""
    print("\n\n".join(sections(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
