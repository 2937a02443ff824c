"""A run's figures: losses and condition numbers over the steps."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.errors import printable, shortened
from lsr_scale.run.metrics import finite_values, read_metrics


def draw_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training (and evaluation) loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, style, color in (("loss", "training", "-", "C0"), ("eval_loss", "validation", "o-", "C1")):
        points = [(row["step"], row[key]) for row in rows if finite_values([row], key)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        style = style if len(values) > 2 else "o-"
        axes.plot(steps, values, style, label=label, alpha=0.35 if len(values) > 20 else 1.0, color=color)
        if len(values) > 20:
            width = max(2, len(values) // 10)
            means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
            axes.plot(steps, means, color=color, label=f"{label}, mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(picture_text(title))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    save_figure(figure, picture)


def picture_text(text: str) -> str:
    """Return text for a picture as it stands: pyplot would read formulas between dollars."""
    return shortened(printable(text), 100).replace("$", r"\$")


def save_figure(figure: Any, picture: Path) -> None:
    """Write a pyplot figure as a PNG and close it; without date or version, so that the same run draws the same bytes.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, metadata=files.PICTURE_METADATA)
    pyplot.close(figure)
    files.write_bytes(picture, drawn.getvalue())


def draw_conditions(metrics: Path, picture: Path, title: str) -> bool:
    """Draw gamma over the steps of a run, median and largest by side; return False where none was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row
        for row in read_metrics(metrics)
        if any(name.startswith("condition_") and finite_values([row], name) for name in row)
    ]
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for color, name in zip(("C0", "C1", "C2", "C3"), _names(rows), strict=False):
        for kind, style in (("median", "-"), ("max", "--")):
            key = f"condition_{name}_{kind}"
            points = [(row["step"], row[key]) for row in rows if finite_values([row], key)]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {kind} over the modules")
    axes.set(xlabel="step", ylabel="condition number gamma", title=picture_text(title))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2.0))  # or 2 % would look like a cliff
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, picture)
    return True


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("condition_") and key.endswith("_max"))
    return [key.removeprefix("condition_").removesuffix("_max") for key in keys]
