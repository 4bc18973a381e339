"""The figure of `relation_circuit`: from words through heads, by axis, to the layout and the
objects.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_lens.viz import style

WORDS = {"vertical": "above\nbelow\nupper …", "horizontal": "left\nright"}
PLACES = {"vertical": "higher\nlower", "horizontal": "left\nright"}
TURNS = {"vertical": "y_turned", "horizontal": "x_turned"}
HEIGHT = {"vertical": 0.75, "horizontal": 0.25}
WIDEST = 7.0
"""Points: a line of the whole share."""
SEEN = 0.02
"""Smallest loss that is drawn."""
SHORT = {"self-attention": "self-attention", "cross-attention queries": "queries", "MLPs": "MLPs"}


@style.styled
def circuit_figure(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]) -> Figure:
    """A panel a model. `parts`: model → (sets, images, paths) of `relation_circuit`."""
    rows = (len(parts) + 1) // 2
    size, look = (9.2, 4.1 * rows), {"frame_on": False, "xticks": (), "yticks": ()}
    whole, axes = plt.subplots(
        rows, 2, figsize=size, layout="constrained", squeeze=False, subplot_kw=look
    )
    for ax, (name, (sets, images, paths)) in zip(axes.ravel(), parts.items(), strict=False):
        draw_circuit(ax, sets, images, paths)
        bound = images[(images["condition"] == "set") & (images["binding"] == 1)]["opposite"]
        told = f"{sets['head'].nunique()} heads redraw {bound.sum():.0f} of {len(bound)} images"
        ax.set_title(f"{name}: {told}", loc="left")
    return whole


def draw_circuit(ax: Axes, sets: pd.DataFrame, images: pd.DataFrame, paths: pd.DataFrame) -> None:
    """Lines from words: share of gain².

    Lines to the layout: turned layouts lost without the head.
    """
    ax.set(xlim=(-0.3, 3.35), ylim=(-0.24, 1.24))
    order = sets.groupby("head")["share"].agg(lambda shares: shares.max()).index
    vertical = sets[sets["axis"] == "vertical"].set_index("head")["share"]
    horizontal = sets[sets["axis"] == "horizontal"].set_index("head")["share"]
    leaning = {head: vertical.get(head, 0.0) - horizontal.get(head, 0.0) for head in order}
    heads = sorted(order, key=lambda head: -leaning[head])
    levels = dict(
        zip(heads, np.linspace(0.95, 0.05, len(heads)) if len(heads) > 1 else [0.5], strict=True)
    )
    means = images.groupby("condition")[list(TURNS.values())].mean()
    for axis, level in HEIGHT.items():
        box(ax, 0, level, WORDS[axis])
        box(ax, 2.1, level, PLACES[axis])
        ax.annotate(
            "", (2.72, 0.5), (2.36, level), arrowprops={"arrowstyle": "-|>", "color": style.INK}
        )
        own = sets[sets["axis"] == axis]
        for head, share in zip(map(str, own["head"]), own["share"].to_numpy(float), strict=True):
            line(ax, (0.26, 0.82), (level, levels[head]), head, share)
        for head, at in levels.items():
            lost = float(means[TURNS[axis]]["set"]) - float(means[TURNS[axis]][f"without {head}"])
            if lost > SEEN:
                line(ax, (1.28, 1.83), (at, level), head, lost)
    for head, at in levels.items():
        look = style.upon(style.head_color(head))
        ax.text(1.05, at, head, fontsize=9, weight="bold", zorder=3, **look)
    box(ax, 3.03, 0.5, "objects")
    through = paths.groupby("frozen", sort=False)["lost"].mean()
    told = ", ".join(f"{SHORT[str(kind)]} {value:.2f}" for kind, value in through.items())
    ax.text(
        -0.25, -0.23, f"turn lost with one part behind frozen:\n{told}", va="bottom", fontsize=9
    )
    for x, what in ((0, "words"), (1.05, "heads"), (2.1, "layout")):
        ax.text(x, 1.16, what, ha="center", weight="bold")
    ax.text(0.54, 1.06, "share of gain²", ha="center", fontsize=9, style="italic")
    ax.text(1.56, 1.06, "lost without it", ha="center", fontsize=9, style="italic")


def line(ax: Axes, x: tuple[float, float], y: tuple[float, float], head: str, size: float) -> None:
    """Line of a head's colour, as wide as its effect."""
    color = style.head_color(head)
    ax.plot(x, y, color=color, linewidth=0.4 + WIDEST * size, solid_capstyle="butt", zorder=1)


def box(ax: Axes, x: float, y: float, text: str) -> None:
    """Labelled node."""
    shape = {"boxstyle": "round", "facecolor": "none", "edgecolor": style.INK}
    ax.text(x, y, text, ha="center", va="center", bbox=shape, zorder=3)
