"""A figure as inline SVG whose text and colours are the page's: legible in light and dark, and on a narrow screen."""

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsr_scale.run.plots import COLORS

# the sizes at which a figure is drawn, in inches: for a page's full width, and for that of a telephone
WIDE, NARROW = (8.2, 3.7), (4.2, 3.7)


@dataclass(frozen=True)
class Drawn:
    """A figure of a page: drawn for a wide and for a narrow screen, with what stands under it."""

    wide: str
    narrow: str
    caption: str


def drawn(make: Callable[[tuple[float, float]], Any], alt: str, caption: str) -> Drawn:
    """Return a figure for a page.

    Args:
        make: Returns the matplotlib figure of a size in inches.
        alt: What it shows, in a sentence, for who does not see it.
        caption: Text under it.
    """
    pictures = {name: svg(make(size), alt, name) for name, size in (("wide", WIDE), ("narrow", NARROW))}
    return Drawn(pictures["wide"], pictures["narrow"], caption)


def svg(figure: Any, alt: str, name: str) -> str:
    """Return a matplotlib figure as an SVG element of class `name`, without a background."""
    import matplotlib

    written = io.StringIO()
    # text stays text; the salt keeps names that elements refer to each other by apart from those of another figure
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{name} {alt}"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', text)
    body = text[text.index(">") + 1 :]
    # names that nothing refers to would stand twice in a page of several figures
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", body)
    for index, color in enumerate(COLORS):
        body = body.replace(color, f"var(--s{index})")
    body = body.replace("#ffffff", "var(--page)").replace("#b0b0b0", "var(--quiet)").replace("#000000", "var(--ink)")
    label = html.escape(alt, quote=True)
    return f'<svg class="{name}" role="img" aria-label="{label}" {view[0] if view else ""}>{body}'
