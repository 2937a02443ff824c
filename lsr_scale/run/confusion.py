"""A classifier's confusion matrix as a picture: each class's rows by the class that was predicted for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lsr_scale.run.plots import picture_text, save_figure

_LONGEST_NAME = 32
_MOST_NUMBERS = 40  # classes; of more, cells are too small for numbers


def draw_confusion(counts: np.ndarray, names: Sequence[str], picture: Path, title: str) -> None:
    """Draw a confusion matrix as a PNG: counts, and their share of the row by colour and in percent.

    Args:
        counts: `[labels, labels]`, rows that have class i and were predicted as class j.
        names: The classes' names, class 0 first.
        picture: The file.
        title: Above it.

    Raises:
        UserError: if the file cannot be written.
    """
    # without pyplot, whose backend is the whole process's
    from matplotlib.figure import Figure

    count = len(names)
    totals = counts.sum(1)
    shares = counts / np.maximum(1, totals)[:, None]
    cell = 1.1 if count <= 4 else 0.75 if count <= 10 else 0.58 if count <= _MOST_NUMBERS else 0.16
    shown = [picture_text(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}...") for name in names]
    margin = 1.0 + 0.085 * min(_LONGEST_NAME, max(map(len, names)))
    size = (min(60, cell * count + margin + 1.6), min(60, cell * count + margin + 0.9))
    figure = Figure(figsize=(max(4.6, size[0]), max(3.6, size[1])), dpi=110, layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    every = max(1, round(count / 120))  # beyond, names would lie on one another
    axes.set_xticks(range(0, count, every), shown[::every], rotation=90 if count > 4 or margin > 2 else 0)
    rows = [f"{name} ({total:,})" for name, total in zip(shown, totals, strict=True)]
    axes.set_yticks(range(0, count, every), rows[::every])
    axes.tick_params(labelsize=9 if count <= _MOST_NUMBERS else 6, length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label (rows)")
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{picture_text(title)}: {right:,} of {total:,} right", fontsize=10)
    axes.set_xticks(np.arange(-0.5, count), minor=True)
    axes.set_yticks(np.arange(-0.5, count), minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    if count <= _MOST_NUMBERS:
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[i, j] > 0.55 else "black"
            size_of_text = 10 if count <= 4 else 8 if count <= 10 else 6.5
            percent = f"{100 * shares[i, j]:.0f}" if shares[i, j] >= 0.005 else "< 1"
            text = f"{counts[i, j]:,}\n{percent} %"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=size_of_text)
    figure.colorbar(image, ax=axes, label="share of the label's rows", fraction=0.04, pad=0.02)
    save_figure(figure, picture)
