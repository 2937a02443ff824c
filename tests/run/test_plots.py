"""A run's figures: what is drawn, in which words, and ticks that read."""

import matplotlib
import pytest

from lsr_scale.run.plots import SIZE, conditions_figure, curves_figure, loss_figure, smoothing, underflow_figure
from lsr_scale.run.policy_plots import rewards_figure
from tests.helpers.run_folders import losses, rewards


def curves(num=40, every=10, name="loss"):
    rows = (losses if name == "loss" else rewards)(num, every=every)
    return {key: [(row["step"], row[key]) for row in rows if key in row] for key in (name, f"eval_{name}")}


def words(figure):
    texts = ((legend.get_title(), *legend.get_texts()) for legend in figure.legends)
    return [text.get_text() for of_legend in texts for text in of_legend]


def ticks(axis):
    axis.axes.figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def test_evaluations_the_best_of_them_and_smoothing_are_said():
    told = words(loss_figure(curves(), "a title"))
    assert "training, mean of 4 logged steps" in told
    assert "evaluation" in told
    assert any(text.startswith("best evaluation: ") and text.endswith("step 30") for text in told)


def test_a_short_run_is_drawn_as_it_is():
    points = curves(num=12, every=0)["loss"]
    assert smoothing(points) == 1
    (line,) = loss_figure({"loss": points}, "").axes[0].lines
    assert list(line.get_ydata()) == [value for _, value in points]


def test_a_smoothed_line_is_the_mean_of_the_steps_that_it_says():
    points = curves()["loss"]
    smoothed = loss_figure({"loss": points}, "").axes[0].lines[1].get_ydata()
    assert abs(smoothed[20] - sum(value for _, value in points[17:21]) / 4) < 1e-12


def test_steps_are_whole_and_thousands_have_commas():
    for num in (3, 40, 12_000):
        shown = ticks(loss_figure(curves(num=num, every=0), "").axes[0].xaxis)
        assert all(text.replace(",", "").replace("\u2212", "").isdigit() for text in shown), shown
    assert "10,000" in shown


def test_losses_that_hardly_differ_have_no_offset():
    figure = loss_figure({"loss": [(step, 1000.0 + step / 1e4) for step in range(5)]}, "")
    figure.draw_without_rendering()
    assert figure.axes[0].yaxis.get_offset_text().get_text() == ""


def test_condition_numbers_are_written_out():
    rows = [{"step": step, "condition_up_median": 1.0, "condition_up_max": 1.02} for step in range(5)]
    figure = conditions_figure(rows, "")
    assert set(ticks(figure.axes[0].yaxis)) <= {"0.1", "0.2", "0.5", "1", "2", "5", "10"}
    assert "up: largest of the modules" in words(figure)
    assert conditions_figure([{"step": 1, "loss": 2.0}], "") is None


def test_shares_of_underflow_are_drawn_in_percent():
    rows = [{"step": s, "underflow_input_median": 0.001, "underflow_input_max": 0.04} for s in range(5)]
    figure = underflow_figure(rows, "")
    assert "1.00%" in ticks(figure.axes[0].yaxis)
    assert "activations: largest of the groups" in words(figure)
    assert underflow_figure([{"step": 1, "loss": 2.0}], "") is None


def test_the_lines_of_twelve_runs_can_be_told_apart():
    figure = curves_figure({f"{number}: run $x$ {number}": curves() for number in range(12)})
    training = [line for line in figure.axes[0].lines if line.get_linewidth() > 1.5]
    assert len({(line.get_color(), line.get_linestyle()) for line in training}) == 12
    told = words(figure)
    assert any("mean of 4 logged steps" in text and "stars: the best" in text for text in told)
    assert len([text for text in told if "run" in text]) == 12


def stars(axes):
    """Return where the stars of a panel are."""
    return [tuple(*line.get_xydata().tolist()) for line in axes.lines if line.get_marker() == "*"]


def test_of_rewards_the_highest_has_the_star():
    points = curves(name="reward")
    figure = curves_figure({"a": points, "b": points})
    (axes,) = figure.axes
    assert axes.get_ylabel() == "reward"
    assert stars(axes) == [max(points["eval_reward"], key=lambda point: point[1])] * 2
    assert words(figure)[0].startswith("lines: training reward, mean of 4 logged steps;")


def test_losses_and_rewards_have_a_panel_each():
    figure = curves_figure({"a": curves(), "b": curves(name="reward"), "c": curves()})
    above, below = figure.axes
    assert [above.get_ylabel(), below.get_ylabel()] == ["loss, nats per token", "reward"]
    assert [above.get_xlabel(), below.get_xlabel()] == ["", "step"]
    assert [len(stars(axes)) for axes in (above, below)] == [2, 1]
    heading, *names = words(figure)
    assert names == ["a", "b", "c"]
    assert "runs of grpo are below, by reward" in " ".join(heading.split())


@pytest.mark.parametrize("length", [10, 40, 80, 200])
@pytest.mark.parametrize("size", [SIZE, (4.0, 3.0)])
def test_long_names_stay_within_the_picture(length, size):
    names = [f"{number}:{'wide=' * length}"[:length] for number in range(5)]
    figure = curves_figure({name: curves() for name in names}, "", size)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.width
    assert len({text for text in words(figure) if text[1:2] == ":"}) == 5


def test_legends_lie_outside_of_the_panel():
    rows = [
        {"step": step, "reward": 0.5, "completions/mean_length": 8.0, "completions/clipped_ratio": 1.0}
        for step in (1, 2)
    ]
    figures = (loss_figure(curves(), ""), curves_figure({"a": curves(), "b": curves()}), rewards_figure(rows, ""))
    for figure in figures:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_user_s_backend_stays_what_it_is():
    before = matplotlib.get_backend(auto_select=False)
    loss_figure(curves(), "")
    assert matplotlib.get_backend(auto_select=False) == before
