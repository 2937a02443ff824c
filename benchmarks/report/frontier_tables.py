"""The frontier's tables and figures: nats a token against trainable parameters, every method.

python -m benchmarks.report.frontier_tables            print every table
"""

import functools
import itertools
import sys
from pathlib import Path

from benchmarks.quality import frontier_verdicts
from benchmarks.quality.frontier import RESULTS
from benchmarks.quality.frontier_rows import OURS
from benchmarks.quality.frontier_verdicts import Frontier, Score, Suite, Verdict, load
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


def series(score: Score) -> str:
    """Return the line of the figure that a row belongs to: its method, SLoRA's IntTune by itself."""
    return "inttune" if score.options.get("train") == "middle" else score.method


def label(score: Score) -> str:
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


def heading(suite: Suite) -> str:
    """Return what a suite is called."""
    model, regime, base = suite
    return f"{MODEL_NAMES[model]}, {REGIME_NAMES[regime]}, base in {'bf16' if base == 'none' else base}"


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
                f"{_percent(score.accuracy)} | {score.seeds} | {score.rate:g} |"
            )
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def verdict_table(found: list[Verdict]) -> list[str]:
    """Return the comparisons at each size in Markdown."""
    lines = [
        "| model, texts, base | size | best of ours | best of the others | difference, nats a token (95 %) | "
        "p, corrected | |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for one in found:
        result = "no separation" if not one.separates else "ours" if one.wins else "the other"
        lines.append(
            f"| {heading(one.ours.suite)} | {one.ours.size} | {label(one.ours)} | {label(one.theirs)} | "
            f"{interval(one)} | {one.corrected_p:.2g} | {result} |"
        )
    return lines


def interval(one: Verdict) -> str:
    """Return a difference with its interval, in nats a token."""
    return f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f})"


def draw(found: Frontier, suite: Suite, path: Path) -> None:
    """Draw a suite: nats a token against parameters, a line a method through its best row at each size."""
    from matplotlib import pyplot

    mine = found.of(suite)
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for method in NAMES:
        rows = [score for score in mine if series(score) == method]
        if not rows:
            continue
        color = f"C{list(NAMES).index(method)}"
        marker = "s" if method in OURS else "o"
        of_sizes = (list(group) for _, group in itertools.groupby(rows, key=lambda s: s.size))
        best = [min(of_size, key=lambda s: s.nats) for of_size in of_sizes]
        width = 2 if method in OURS else 1.2
        axis.plot([s.parameters for s in best], [s.nats for s in best], color=color, lw=width)
        points = zip(*((s.parameters, s.nats, s.error) for s in rows), strict=True)
        style = {"fmt": marker, "ms": 5, "ls": "", "elinewidth": 1, "capsize": 3}
        axis.errorbar(*points, **style, color=color, label=NAMES[method])
    counts = [score.parameters for score in mine]
    axis.set_xscale("log")
    count_ticks(axis.xaxis, min(counts), max(counts))
    axis.set_xlabel("trainable parameters (log scale)")
    axis.set_ylabel("held-out loss of the right answers, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, title="bars: standard error over questions and seeds", title_fontsize=8)
    axis.set_title(heading(suite), fontsize=11)
    figure.tight_layout()
    save(figure, path, digest(found, suite))


def digest(found: Frontier, suite: Suite) -> str:
    """Return what a suite's figure is recognized by."""
    tests = [r for r in found.done.values() if (r["model"], r["regime"], r["base"]) == suite and r["part"] == "test"]
    return rows_digest([[r["row"], r.get("size"), r.get("seed"), r["nll"]] for r in tests])


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
        parts.append("\n".join(verdict_table(found.verdicts)))
    if found.diverged:
        parts.append(f"Diverged, and their rows left out: {', '.join(found.diverged)}.")
    return parts


def main() -> int:
    """Print every table; return the exit status."""
    print("\n\n".join(sections(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
