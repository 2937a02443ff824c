"""GUIDE.md's tables and plots of methods, sizes and options."""

import pytest

from benchmarks import ALL_RESULTS
from benchmarks.quality import trials
from benchmarks.report import guide, guide_plots
from benchmarks.report.plots import drawn_from


def test_a_page_without_a_place_is_said():
    with pytest.raises(SystemExit, match=r"no place for scaling: put <!-- scaling"):
        guide.filled("nothing", ALL_RESULTS)


def test_what_was_not_run_is_said(tmp_path):
    assert guide.trial_table("none", {}, tmp_path) == "Not run yet."


def test_plots_carry_their_rows(tmp_path):
    for path, plot in guide_plots.plots(ALL_RESULTS).items():
        plot.draw(tmp_path / path.name)
        assert drawn_from(tmp_path / path.name) == plot.digest


def test_what_is_said_of_the_image_runs_is_in_their_results():
    done = trials.load(ALL_RESULTS / "vision")
    adapted = [result for result in done.values() if result["method"] is not None]
    assert adapted
    # a run that diverged has no logits to compare
    assert all(result["reload_max_difference"] == 0 for result in adapted if result["score"] is not None)
    assert {result["steps"] for result in done.values()} == {120}
