"""What all plots of the measurements share: ticks that read, labels that stand on nothing, and who drew them."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

STYLE = 2  # raise it where plots are drawn differently, and all are drawn anew

# places of a label around its point: offset in points, and which of its ends is there
_PLACES = [
    *((6, 5, "left"), (6, -11, "left"), (-6, 5, "right"), (-6, -11, "right"), (0, 9, "center"), (0, -16, "center")),
    *((6, 14, "left"), (-6, 14, "right"), (6, -20, "left"), (-6, -20, "right"), (26, 5, "left"), (-26, 5, "right")),
]


def rows_digest(rows: Any) -> str:
    """Return what a plot of these values is recognized by."""
    return hashlib.sha256(json.dumps([STYLE, rows], sort_keys=True).encode()).hexdigest()


def save(figure: Any, path: Path, digest: str) -> None:
    """Write a plot with the digest of what it shows, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Source": digest})
    pyplot.close(figure)


def card(environment: dict[str, Any]) -> str:
    """Return the name of the GPU that was measured on."""
    gpus = environment.get("gpus") or []
    return str(gpus[0]).removeprefix("NVIDIA ") if gpus else str(environment.get("cpu", "a CPU"))


def thousands(axis: Any) -> None:
    """Write an axis' ticks with commas: 17,500."""
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def count_ticks(axis: Any, low: float, high: float) -> None:
    """Put ticks such as 300k, 1M, 2M on a logarithmic axis of counts between two numbers."""
    steps = (1, 2, 3, 5) if high / low > 4 else (1, 1.5, 2, 3, 5, 7)
    ticks = [step * 10**power for power in range(3, 11) for step in steps]
    inside = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def short_count(value: float) -> str:
    """Return a count in a few characters: 300k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def label_points(axes: Any, points: Sequence[tuple[float, float, str, Any]], fontsize: float = 7.5) -> None:
    """Write a label of a colour beside each point, where it covers no other label, point, error bar or line, if it can.

    Called last: the axes' limits are to be what they stay.
    """
    axes.figure.canvas.draw()
    taken = [_box_around(axes.transData.transform((x, y)), 5) for x, y, *_ in points]
    strokes = _strokes(axes)
    for x, y, text, color in sorted(points, key=lambda point: (point[1], point[0])):
        best: tuple[int, Any, Any] | None = None
        for right, up, end in _PLACES:
            style = {"fontsize": fontsize, "color": color, "ha": end, "zorder": 6}
            label = axes.annotate(text, (x, y), (right, up), textcoords="offset points", **style)
            box = label.get_window_extent().expanded(1.02, 1.05)
            outside = not axes.bbox.contains(box.x0, box.y0) or not axes.bbox.contains(box.x1, box.y1)
            own = _box_around(axes.transData.transform((x, y)), 3)
            covered = sum(box.overlaps(other) for other in taken if not own.overlaps(other) or other.width > 11)
            covered += sum(any(box.contains(*place) for place in stroke) for stroke in strokes)
            cost = 10 * outside + covered
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, label, box)
            else:
                label.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _box_around(place: Sequence[float], size: float) -> Any:
    x, y = place
    return Bbox.from_extents(x - size, y - size, x + size, y + size)


def _strokes(axes: Any) -> list[list[tuple[float, float]]]:
    """Return points along each line and error bar, on the screen."""
    segments = []
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        segments += list(itertools.pairwise(corners))
    for collection in axes.collections:
        for path in collection.get_paths():
            corners = collection.get_transform().transform(path.vertices)
            segments += list(itertools.pairwise(corners))
    along = []
    for start, end in segments:
        parts = max(1, int(max(abs(end - start)) / 3))
        along.append([tuple(start + (end - start) * part / parts) for part in range(parts + 1)])
    return along
