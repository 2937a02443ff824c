"""A run's figures: losses and condition numbers over the steps, and the losses or rewards of several runs in one."""

import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsr_scale import files
from lsr_scale.config.comparison import OBJECTIVES, Objective
from lsr_scale.config.training import lower_is_better
from lsr_scale.errors import UserError, printable, shortened
from lsr_scale.run.metrics import finite_values, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
Curves = Mapping[str, Points]
# Okabe and Ito's, which the colour-blind tell apart, without their yellow and black: one is pale, one is the text's
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLES = ("-", "--", ":")  # each colour again, for more than six lines
SIZE = (7.0, 4.0)  # inches
_NARROW = 5.0  # inches of width that hold no two columns of a legend
NATS = "nats per token"  # the unit of a cross-entropy
_RAW = 20  # more points than that are smoothed
_POINTS_DRAWN = 2_000  # of a line that is not smoothed


def draw_losses(metrics: Path, picture: Path, title: str, unit: str = NATS) -> None:
    """Draw the training (and evaluation) loss over the steps as a PNG; `unit` is the loss's, "" for none."""
    rows = read_metrics(metrics)
    curves = {key: [(row["step"], row[key]) for row in rows if finite_values([row], key)] for key in CURVES}
    save_figure(loss_figure(curves, title, unit=unit), picture)


CURVES = ("loss", "eval_loss")


def loss_figure(curves: Curves, title: str, size: tuple[float, float] = SIZE, unit: str = NATS) -> "Figure":
    """Return the figure of a run's losses.

    Args:
        curves: (step, loss) of training, "loss", and of evaluations, "eval_loss".
        title: The figure's one title, "" for none.
        size: Its inches.
        unit: The loss's, "" for none.
    """
    figure, axes = titled_figure(title, size)
    training, evaluation = (curves.get(key) or [] for key in CURVES)
    if training:
        _plot_training(axes, training, COLORS[0], "training")
    if evaluation:
        axes.plot(*_columns(evaluation), "o-", color=COLORS[1], markersize=4, linewidth=1.2, label="evaluation")
        step, best = min(evaluation, key=lambda point: point[1])
        label = f"best evaluation: {best:.4f}, step {step:,}"
        axes.plot(step, best, "*", color=COLORS[1], markersize=13, markeredgecolor="white", label=label, zorder=5)
    axes.set_xlabel("step")
    axes.set_ylabel(", ".join(filter(None, ("loss", unit))))
    if axes.lines:
        figure_legend(figure)
    return figure


def curves_figure(curves: Mapping[str, Curves], title: str = "", size: tuple[float, float] = SIZE) -> "Figure":
    """Return the figure of several runs' losses, or rewards: training as smoothed lines, evaluations as marks.

    Args:
        curves: By the run's name, (step, value) of training, "loss", and of evaluations, "eval_loss"; of a run that is
            judged by its reward "reward" and "eval_reward" instead. Where there are both, each has a panel.
        title: The figure's one title, "" for none.
        size: Its inches; a legend of many runs, and a second panel, add to the height.
    """
    longest = max((len(printable(name)) for name in curves), default=0)
    columns = 2 if size[0] > _NARROW and len(curves) > 2 and longest <= _characters(size[0] / 2) else 1
    shown = [name for name in OBJECTIVES if any(_has_curve(points, name) for points in curves.values())] or ["loss"]
    height = size[1] * (1 + 0.6 * (len(shown) - 1)) + 0.2 * (2 + -(-len(curves) // columns))
    figure, panels = titled_figure(title, (size[0], height), rows=len(shown))
    axes_of = dict(zip(shown, panels if len(shown) > 1 else [panels], strict=True))
    trained = [points[name] for points in curves.values() for name in shown if points.get(name)]
    width = max(map(smoothing, trained), default=1)
    evaluated, named = False, []
    for index, (run, points) in enumerate(curves.items()):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": _STYLES[index // len(COLORS) % len(_STYLES)]}
        label = picture_text(shortened(printable(run), _characters(size[0] / columns)))
        lines = []
        for name, axes in axes_of.items():
            if training := points.get(name):
                lines += axes.plot(*_columns(_smoothed(training, width)), label=label, linewidth=1.6, **style)
            if evaluation := points.get(f"eval_{name}"):
                evaluated = True
                marks = {"marker": "o", "markersize": 4, "linewidth": 0.8, "alpha": 0.75, "label": label}
                lines += axes.plot(*_columns(evaluation), **marks, **style)
                better = min if lower_is_better(f"eval_{name}") else max
                best = better(evaluation, key=lambda point: point[1])
                axes.plot(*best, "*", color=style["color"], markersize=13, markeredgecolor="white", zorder=5)
        named += lines[:1]
    axes_of[shown[-1]].set_xlabel("step")
    for name, axes in axes_of.items():
        axes.set_ylabel(f"loss, {NATS}" if name == "loss" else name)
    training = f"training {' or '.join(shown)}"
    smoothed = f"{training}, mean of {width} logged steps" if width > 1 else training
    heading = f"lines: {smoothed}" + ("; dots: evaluations, stars: the best" if evaluated else "")
    if len(shown) > 1:
        heading += "; runs of grpo are below, by reward"
    if named:
        place = {"loc": "outside lower center", "ncols": columns, "title": textwrap.fill(heading, int(16 * size[0]))}
        legend = figure.legend(handles=named, frameon=False, fontsize=8.5, title_fontsize=8.5, **place)
        legend.get_title().set_multialignment("center")
    return figure


def _has_curve(points: Curves, objective: Objective) -> bool:
    return bool(points.get(objective) or points.get(f"eval_{objective}"))


def _characters(inches: float) -> int:
    """Return how many characters of a legend's text there is room for, beside the line that it names."""
    return max(10, int((inches - 0.6) / 0.075))


def draw_curves(curves: Mapping[str, Curves], picture: Path, title: str = "") -> None:
    """Draw `curves_figure` as a PNG.

    Raises:
        UserError: if something else than an earlier picture of ours lies there, or it cannot be written.
    """
    check_picture_place(picture, "--plot")
    save_figure(curves_figure(curves, title), picture)


def check_picture_place(picture: Path, option: str) -> None:
    """Raise a UserError if a picture would take the place of something else than an earlier one of ours."""
    if os.path.lexists(picture) and not files.is_own_picture(picture):
        raise UserError(
            f"{picture}: not written: what lies there is no picture that lsr-scale drew; name another with "
            f"{option} FILE"
        )


def smoothing(points: Points) -> int:
    """Return over how many logged steps a loss is averaged to be drawn: a tenth of them, 1 where they are few."""
    return max(2, len(points) // 10) if len(points) > _RAW else 1


def _smoothed(points: Points, width: int) -> list[tuple[int, float]]:
    """Return the means of each point and the `width - 1` before it."""
    values = [value for _, value in points]
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def smoothed_points(points: Points) -> tuple[list[int], list[float]]:
    """Return the steps and values of what was logged, smoothed where it is much."""
    return _columns(_smoothed(points, smoothing(points)))


def _plot_training(axes: Any, points: Points, color: str, label: str) -> None:
    width = smoothing(points)
    if width == 1:
        axes.plot(*_columns(points), "-" if len(points) > 2 else "o-", color=color, label=label)
        return
    axes.plot(
        *_columns(points[:: -(-len(points) // _POINTS_DRAWN)]), color=color, alpha=0.3, linewidth=0.9, label=label
    )
    means = _smoothed(points, width)
    axes.plot(*_columns(means), color=color, linewidth=1.8, label=f"{label}, mean of {width} logged steps")


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def titled_figure(title: str, size: tuple[float, float] = SIZE, rows: int = 1) -> tuple["Figure", Any]:
    """Return a figure with panels over the steps, one or a list; made without pyplot, whose backend is the user's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0].tolist()
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if title:
        panels[0].set_title(picture_text(title), fontsize=11)
    return figure, panels if rows > 1 else panels[0]


def figure_legend(figure: Any) -> None:
    """Put the legend above the panel, where it covers no line."""
    columns = 2 if figure.get_figwidth() > _NARROW else 1
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)


def picture_text(text: str) -> str:
    """Return text for a picture as it stands: matplotlib would read formulas between dollars."""
    return shortened(printable(text), 100).replace("$", r"\$")


def save_figure(figure: Any, picture: Path) -> None:
    """Write a figure as a PNG, and close it; without date or version, so that the same run draws the same bytes.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata=files.PICTURE_METADATA)
    pyplot.close(figure)
    files.write_bytes(picture, drawn.getvalue())


def draw_conditions(metrics: Path, picture: Path, title: str) -> bool:
    """Draw gamma over the steps of a run, median and largest by side; return False where none was logged."""
    figure = conditions_figure(read_metrics(metrics), title)
    if figure is None:
        return False
    save_figure(figure, picture)
    return True


def conditions_figure(
    metrics: Sequence[dict[str, Any]], title: str, size: tuple[float, float] = SIZE
) -> "Figure | None":
    """Return the figure of gamma over the steps, None where none was logged."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [row for row in metrics if any(name.startswith("condition_") and finite_values([row], name) for name in row)]
    if not rows:
        return None
    figure, axes = titled_figure(title, size)
    for color, name in zip(COLORS, _names(rows), strict=False):
        for kind, style in (("median", "-"), ("max", "--")):
            key = f"condition_{name}_{kind}"
            points = [(row["step"], row[key]) for row in rows if finite_values([row], key)]
            if points:
                words = "largest" if kind == "max" else kind
                axes.plot(*_columns(points), style, color=color, label=f"{name}: {words} of the modules")
    axes.set(xlabel="step", ylabel="condition number gamma (log scale)")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2.0))  # or 2 % would look like a cliff
    decades = max(high, 2.0) / min(low, 0.5)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if decades < 1e3 else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure_legend(figure)
    return figure


def underflow_figure(
    metrics: Sequence[dict[str, Any]], title: str, size: tuple[float, float] = SIZE
) -> "Figure | None":
    """Return the figure of the shares of values that underflow in 8 bits over the steps, None where none was logged."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = titled_figure(title, size)
    for color, kind, words in zip(COLORS, ("input", "gradient"), ("activations", "output gradients"), strict=False):
        for which, style in (("median", "-"), ("max", "--")):
            key = f"underflow_{kind}_{which}"
            points = [(row["step"], row[key]) for row in metrics if finite_values([row], key)]
            if points:
                label = f"{words}: {'largest' if which == 'max' else which} of the groups"
                axes.plot(*_columns(points), style, color=color, label=label)
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel="share of values that underflow")
    axes.set_ylim(0, max(axes.get_ylim()[1], 0.01))  # or a share of a millionth would look like a cliff
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure_legend(figure)
    return figure


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("condition_") and key.endswith("_max"))
    return [key.removeprefix("condition_").removesuffix("_max") for key in keys]
