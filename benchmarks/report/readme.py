"""Tables and plots from the committed measurements; nothing here is typed by hand.

    python -m benchmarks.report            write README's tables, RESULTS.md, LEADERBOARD.md and the plots
    python -m benchmarks.report --check    fail if any of them is not what the JSON says

The newest file of a model and a base that has LSR-Adapt and Unsloth at 4 x 2,048 tokens is shown. A table stands in
README.md between the two markers that name it; a plot carries a digest of its rows.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.report import commonsense_tables, leaderboard, results_page
from benchmarks.report.plots import (
    LABELS,
    MODES,
    by_provider,
    digest,
    drawn_from,
    memory_plot,
    scaling_digest,
    scaling_plot,
    sweep_plot,
    sweeps,
)
from benchmarks.report.results_page import with_table

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/throughput"
PAGE, LEADERBOARD = ROOT / "benchmarks/RESULTS.md", ROOT / "benchmarks/LEADERBOARD.md"
TOKENS, LENGTH = 8192, 2048


def is_sweep(run: dict[str, Any]) -> bool:
    """Tell whether a measurement has several numbers of tokens or lengths."""
    return len(run["config"].get("points", ())) > 1


def has_headline(run: dict[str, Any]) -> bool:
    """Tell whether a run came as far as LSR-Adapt's and Unsloth's steps, activations kept and recomputed."""
    done = {(row["provider"], row["checkpointing"]) for row in run["rows"] if row["status"] == "ok"}
    return done >= set(itertools.product(("lsr", "unsloth_lora"), MODES))


def newest(model: str, base: str) -> dict[str, Any]:
    """Return the newest measurement of a model and base, its rows those of 4 x 2,048 tokens alone."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{model}-{base}-*.json"))]
    for run in found:
        run["rows"] = [row for row in run["rows"] if (row["tokens"], row["seq_len"]) == (TOKENS, LENGTH)]
    found = [run for run in found if has_headline(run) and not is_sweep(run) and not run["config"].get("memory_gib")]
    if not found:
        raise SystemExit(
            f"no {model}-{base}-*.json in {RESULTS.relative_to(ROOT)}; run python -m benchmarks.speed.throughput"
        )
    return max(found, key=lambda run: run["env"]["date"])


def table(run: dict[str, Any]) -> str:
    """Return the Markdown table of one measurement."""
    config = run["config"]
    lines = [
        "| | " + " | ".join(f"{word}: tokens/s | GiB | LSR over it" for word in MODES.values()) + " |",
        "|---|" + "---:|" * 3 * len(MODES),
    ]
    providers = by_provider(run)
    for name, modes in providers.items():
        cells = [LABELS[name]]
        for mode in MODES:
            row, ours = modes.get(mode), providers["lsr"].get(mode)
            if row is None or row["status"] != "ok":
                cells += ["" if row is None else row["status"], "", ""]
                continue
            ratio = ours["tokens_per_s"] / row["tokens_per_s"] if ours and name != "lsr" else None
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['peak_memory_gib']:.1f}", f"{ratio:.2f}" if ratio else ""]
        lines.append("| " + " | ".join(cells) + " |")
    gpu, date = run["env"]["gpus"][0].removeprefix("NVIDIA "), run["env"]["date"][:10]
    where = f"{config['model']}, {config['base'].upper()}, {TOKENS // LENGTH} x {LENGTH:,} tokens, one {gpu}, {date}"
    return "\n".join([f"{where}; activations kept, or recomputed in the backward pass:", "", *lines])


def scaling_table(folder: Path, model: str = "mistral-7b", base: str = "nf4") -> str:
    """Return the Markdown table of the newest measurement of each number of GPUs above one; "" if there is none."""
    newest: dict[int, dict[str, Any]] = {}
    for _, run in results_page.read(folder):
        config, most = run["config"], max(row["num_gpus"] for row in run["rows"])
        if (config["model"], config["base"], config["device"]) == (model, base, "cuda") and most > 1:
            newest[most] = run  # the oldest come first
    if not newest:
        return ""
    stages = sorted({row["zero_stage"] for run in newest.values() for row in run["rows"]} - {None})
    rows = []
    for gpus, run in sorted(newest.items()):
        found = {row["zero_stage"]: row["scaling"] for row in run["rows"] if row["num_gpus"] == gpus}
        card = run["env"]["gpus"][0].split()[1]
        rows.append([f"{gpus} {card}", *(results_page.number(found.get(stage), ".2f") for stage in stages)])
    config = next(iter(newest.values()))["config"]
    what = f"{model}, {base.upper()}, {config['tokens']:,} tokens a GPU and step"
    table = results_page.grid(["times one GPU without DeepSpeed", *(f"`zero{stage}`" for stage in stages)], rows)
    return f"Tokens/s of the training command, {what}:\n\n{table}"


def main(arguments: list[str] | None = None) -> int:
    """Write everything, or with --check compare it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args(arguments).check
    run, picture = newest("mistral-7b", "nf4"), RESULTS / "mistral-7b-nf4.png"
    text = README.read_text(encoding="utf-8")
    wanted = with_table(text, "throughput", table(run))
    wanted = with_table(wanted, "scaling", scaling_table(RESULTS.parent / "scaling"))
    measured = commonsense_tables.load(RESULTS.parent / "commonsense")
    accuracy = commonsense_tables.short_table(measured, commonsense_tables.HEADLINE)
    wanted = with_table(wanted, "accuracy", accuracy)
    stale = []
    pages = {PAGE: results_page.page(RESULTS.parent), LEADERBOARD: leaderboard.page(RESULTS.parent)}
    if wanted != text:
        stale.append("README.md")
    for path, content in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(f"benchmarks/{path.name}")
    pictures = {picture: (digest(run), functools.partial(memory_plot, run, picture))}
    for path, sweep in results_page.read(RESULTS):
        if sweeps(sweep):
            drawn = path.with_suffix(".png")
            pictures[drawn] = digest(sweep), functools.partial(sweep_plot, sweep, drawn)
    for path, run in results_page.read(RESULTS.parent / "scaling"):
        drawn = path.with_suffix(".png")
        if results_page.is_scaling(run):
            pictures[drawn] = scaling_digest(run), functools.partial(scaling_plot, run, drawn)
    pictures |= commonsense_tables.pictures(RESULTS.parent / "commonsense")
    old = [path for path, (wanted_digest, _) in pictures.items() if drawn_from(path) != wanted_digest]
    stale += [str(path.relative_to(ROOT)) for path in old]
    if check:
        for name in stale:
            print(f"{name} is not what the measurements say; run python -m benchmarks.report", file=sys.stderr)
        return int(bool(stale))
    README.write_text(wanted, encoding="utf-8")
    for path, content in pages.items():
        path.write_text(content, encoding="utf-8")
    for path in old:
        pictures[path][1]()
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
