"""Ticks of the plots that read, and labels that stand on nothing."""

import pytest
from matplotlib import pyplot

from benchmarks.report.drawing import count_ticks, label_points, short_count, thousands


@pytest.fixture(params=["agg", "svg"])  # importing matplotlib's users sets a backend, and a notebook has its own
def axes(request):
    pyplot.switch_backend(request.param)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    yield axes
    pyplot.close(figure)


@pytest.mark.parametrize(("value", "text"), [(300_000, "300k"), (1_500_000, "1.5M"), (7e9, "7B"), (12, "12")])
def test_counts_are_short(value, text):
    assert short_count(value) == text


def test_ticks_are_plain(axes):
    axes.plot([282_240, 2_442_240], [5_000, 17_500])
    axes.set_xscale("log")
    count_ticks(axes.xaxis, 282_240, 2_442_240)
    thousands(axes.yaxis)
    axes.figure.canvas.draw()
    shown = {label.get_text() for label in axes.get_xticklabels(which="both")}
    assert {"300k", "500k", "1M", "2M"} <= shown
    assert "10,000" in {label.get_text() for label in axes.get_yticklabels()}


def test_labels_cover_neither_each_other_nor_points_nor_bars(axes):
    points = [(x, y, f"r={x} s={y}", "black") for x, y in ((1, 1), (1.02, 1.02), (1.04, 1), (1.5, 2), (3, 1.2))]
    for x, y, *_ in points:
        axes.errorbar([x], [y], [0.3], fmt="o", capsize=3)
    axes.set_xlim(0, 4)
    axes.set_ylim(0, 3)
    label_points(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        for x, y, *_ in points:
            for part in range(-10, 11):  # along the bar
                assert not box.contains(*axes.transData.transform((x, y + 0.3 * part / 10)))
