"""The look of every figure that this package draws: sizes, colors, and one color for each head.

Figures have no background of their own, and lines and letters in a grey that is legible on white
and on black. `applied` switches the look on, `problems` lists the faults of a figure, `save` writes
it, as vectors where the format has them.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DIVERGING, SEQUENTIAL = "RdBu_r", "magma"
INK = "#737b85"
"""Lines and letters: at least 4 : 1 against white and against black."""
SMALLEST = 9.0
"""Smallest size of letters, in points at the width at which a figure is shown."""
WIDEST = 10.0
"""Inches: no figure is wider, since pages would shrink it and its letters."""

PARAMETERS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.titlesize": 11,
    "figure.labelsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "boxplot.boxprops.color": INK,
    "boxplot.whiskerprops.color": INK,
    "boxplot.capprops.color": INK,
    "svg.fonttype": "none",  # letters stay letters: small files, and text that can be searched
    "pdf.fonttype": 42,
}
"""matplotlib's parameters."""


@contextmanager
def applied() -> Iterator[None]:
    """Draw in this look inside of a `with` block.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> with applied():
        ...     plt.figure().text(0, 0, "a").get_color() == INK
        True
    """
    with mpl.rc_context(PARAMETERS):
        yield


def head_color(head: str | tuple[int, int]) -> str:
    """Colour of a head, the same in every figure.

    Unlike for the heads of a layer and for neighbouring layers.

    Args:
        head: "L2H1", or (layer, head).

    Returns:
        A colour such as "#4477aa", readable on white and on black.

    Raises:
        ValueError: the name is no head's.

    Example:
        >>> head_color("L2H1") == head_color((2, 1)), head_color("L2H1") == head_color("L2H2")
        (True, False)
    """
    if isinstance(head, str):
        from hooked_models.generation.names import parse_head

        head = parse_head(head)
    layer, number = head
    # turns by the golden ratio spread any number of hues evenly; the layer shifts them and
    # alternates the luminance
    hue, target = (0.58 + number * 0.618034 + layer * 0.161) % 1, 0.23 if layer % 2 else 0.15
    low, high = 0.0, 1.0
    for _ in range(20):  # lightness of the target luminance
        middle = (low + high) / 2
        found = colorsys.hls_to_rgb(hue, middle, 0.65)
        low, high = (middle, high) if luminance(found) < target else (low, middle)
    return mpl.colors.to_hex(found)


def luminance(color: Any) -> float:
    """Relative luminance of a color, 0 for black and 1 for white.

    Source: WCAG 2.2, definition of relative luminance.

    Example:
        >>> luminance("white"), luminance("black")
        (1.0, 0.0)
    """
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in mpl.colors.to_rgb(color)
    ]
    return round(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 6)


def upon(color: Any) -> dict[str, Any]:
    """Options of a centred text on a patch of a color: the patch, and black or white letters.

    Example:
        >>> upon("white")["color"], upon("black")["color"]
        ('black', 'white')
    """
    patch = {"boxstyle": "round,pad=0.15", "facecolor": color, "edgecolor": "none"}
    ink = "white" if luminance(color) < 0.18 else "black"
    return {"color": ink, "bbox": patch, "ha": "center", "va": "center"}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that draws a figure: it draws in this look.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> styled(plt.figure)().get_facecolor()[3]
        0.0
    """

    @wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Figure:
        with applied():
            return draw(*arguments, **options)

    return drawn


def problems(figure: Figure) -> list[str]:
    """Faults of a figure in plain words.

    Small letters, texts that overlap or leave the figure, a background, faint letters, lines and
    bars of a head in another color than the head's.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> with applied():
        ...     figure = plt.figure(figsize=(3, 3))
        ...     _ = figure.text(0.1, 0.5, "tiny", fontsize=5)
        >>> problems(figure)
        ["'tiny' has 5.0 points"]
    """
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    found = [] if figure.get_figwidth() <= WIDEST else [f"{figure.get_figwidth():.1f} inches wide"]
    if mpl.colors.to_rgba(figure.get_facecolor())[3]:
        found.append("a background")
    found += [f"{head!r} has another color than elsewhere" for head in _miscolored(figure)]
    undrawn = set(_labels_out_of_view(figure))
    texts = [
        text
        for text in figure.findobj(mpl.text.Text)
        if text.get_visible() and text.get_text().strip()
    ]
    boxes = [(text, text.get_window_extent(renderer)) for text in texts if text not in undrawn]
    for text, box in boxes:
        found += [f"{text.get_text()!r} {fault}" for fault in _faults(text, box, figure.bbox)]
    for (one, box), (other, second) in combinations(boxes, 2):
        if _overlap(box, second):
            found.append(f"{one.get_text()!r} overlaps {other.get_text()!r}")
    return found


def _miscolored(figure: Figure) -> Iterator[str]:
    """Names of heads in legends whose lines or bars have not the head's color."""
    for ax in figure.findobj(mpl.axes.Axes):
        for drawn, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if re.fullmatch(r"L\d+H\d+", label):
                part: Any = drawn[0] if isinstance(drawn, tuple) else drawn
                color = part.get_color() if hasattr(part, "get_color") else part.get_facecolor()
                if mpl.colors.to_hex(color) != head_color(label):
                    yield label


def _faults(text: mpl.text.Text, box: Any, bounds: Any) -> Iterator[str]:
    """Faults of one text, apart from others."""
    if float(text.get_fontsize()) < SMALLEST:
        yield f"has {text.get_fontsize()} points"
    if not (bounds.x0 - 1 <= box.x0 and box.x1 <= bounds.x1 + 1 and box.y1 <= bounds.y1 + 1):
        yield "leaves the figure"
    shade = luminance(text.get_color())
    if min(1.05 / (shade + 0.05), (shade + 0.05) / 0.05) < 3 and text.get_bbox_patch() is None:
        yield "is faint on white or on black"


def _overlap(box: Any, other: Any) -> bool:
    """True for boxes that share more than a pixel, which is rounding."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    return bool(width > 1 and min(box.y1, other.y1) - max(box.y0, other.y0) > 1)


def _labels_out_of_view(figure: Figure) -> Iterator[mpl.text.Text]:
    """Labels of ticks out of view, which matplotlib keeps and does not draw.

    Beyond the limits of their axis, or of axes not drawn.
    """
    for ax in figure.findobj(mpl.axes.Axes):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not ax.axison or not low <= tick.get_loc() <= high:
                    yield from (tick.label1, tick.label2)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the suffix names the format.

    Vector formats (.svg, .pdf) keep letters as text, pixels get 200 dpi.

    Raises:
        ValueError: matplotlib knows no such format.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> save(plt.figure(), "empty.svg").name
        'empty.svg'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with applied():
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
