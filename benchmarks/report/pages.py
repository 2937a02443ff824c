"""All that is made of the committed measurements: tables of README and GUIDE.md, RESULTS.md, LEADERBOARD.md, plots,
and what `lsr-scale plan --budget` proposes by.

    python -m benchmarks.report            write what is not up to date
    python -m benchmarks.report --check    fail if anything is not what the JSON under `results/` says

Nothing in them is typed by hand. A plot carries a digest of the rows that it shows, so that one older than its
measurement is noticed.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import ALL_RESULTS, ROOT
from benchmarks.report import (
    commonsense_tables,
    frontier_evidence,
    frontier_tables,
    grpo_tables,
    guide,
    guide_plots,
    leaderboard,
    plots,
    readme,
    real_training,
    results_page,
    sharing_plot,
)
from benchmarks.report.plots import Plot, drawn_from

DESCRIPTION = (__doc__ or "").partition("\n\n")[0]


def all_pages(results: Path) -> dict[Path, str]:
    """Return each page's text as the measurements in the folder of all results say it."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "GUIDE.md")}
    return {
        ROOT / "README.md": readme.filled(texts["README.md"], results),
        ROOT / "GUIDE.md": guide.filled(texts["GUIDE.md"], results),
        ROOT / "benchmarks/RESULTS.md": results_page.page(results),
        ROOT / "benchmarks/LEADERBOARD.md": leaderboard.page(results),
        frontier_evidence.FILE: frontier_evidence.text(results / "frontier"),
    }


def all_plots(results: Path) -> dict[Path, Plot]:
    """Return every plot by its file."""
    return (
        plots.plots(results)
        | commonsense_tables.plots(results / "commonsense")
        | guide_plots.plots(results)
        | real_training.plots(results)
        | frontier_tables.plots(results / "frontier")
        | grpo_tables.plots(results / "grpo")
        | sharing_plot.plots(results)
    )


def main(arguments: list[str] | None = None, results: Path = ALL_RESULTS) -> int:
    """Write everything, or with --check compare it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=DESCRIPTION)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args(arguments).check
    pages = {
        path: text
        for path, text in all_pages(results).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    pictures = {path: plot for path, plot in all_plots(results).items() if drawn_from(path) != plot.digest}
    names = [str(path.relative_to(ROOT)) for path in pages] + [str(path.relative_to(results)) for path in pictures]
    if check:
        for name in names:
            print(f"{name} is not what the measurements say; run python -m benchmarks.report", file=sys.stderr)
        return int(bool(names))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for path, plot in pictures.items():
        plot.draw(path)
    print(f"written: {', '.join(names) or 'nothing new'}")
    return 0
