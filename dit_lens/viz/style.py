"""The look of every figure that this package draws: sizes, colours, and one colour for each head.

Figures stand on no background of their own, with lines and letters in a grey that can be read on white and on black; `applied`
switches the look on, `save` writes a figure as a vector file.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DIVERGING, SEQUENTIAL = "RdBu_r", "magma"
INK = "#737b85"
"""Lines and letters: contrast 4.3 with white and 4.9 with black."""
SMALLEST = 8.0
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
    """Colour of a head: the same in every figure, unlike for the heads of a layer and for neighbouring layers.

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
        from ..readout.circuits import parse_head

        head = parse_head(head)
    layer, number = head
    # turns by the golden ratio spread any number of hues evenly; the layer shifts them and alternates the shade
    hue = (0.58 + number * 0.618034 + layer * 0.161) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, 0.44 + 0.08 * (layer % 2), 0.62)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the suffix names the format. Vector formats (.svg, .pdf) keep letters as text; pixels get 200 dpi.

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
