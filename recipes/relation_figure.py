"""The figure of `relation_circuit`: from words through heads, by axis, to the layout and the objects."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_lens.stats import Interval, proportion

WORDS = {"vertical": "above, below,\nupper, lower, …", "horizontal": "left, right"}
PLACES = {"vertical": "higher or\nlower", "horizontal": "further left\nor right"}
TURNS = {"vertical": "y_turned", "horizontal": "x_turned"}
HEIGHT = {"vertical": 0.78, "horizontal": 0.22}
WIDEST = 7.0
"""Points: a line of the whole share."""


def circuit_figure(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]) -> Figure:
    """A row a model: its circuit, and what its images show. `parts`: model → (sets, images, paths) of `relation_circuit`."""
    whole, axes = plt.subplots(
        len(parts), 2, figsize=(9.2, 4.1 * len(parts)), width_ratios=(1.9, 1), layout="constrained", squeeze=False
    )
    for (left, right), (name, (sets, images, paths)) in zip(axes, parts.items(), strict=True):
        heads = sorted(sets["head"].unique())
        colors = dict(zip(heads, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
        draw_circuit(left, sets, images, paths, colors)
        draw_bars(right, images, colors)
        left.set_title(f"{name}: words, heads, layout, objects", loc="left", fontsize=11)
    axes[0][1].set_title("opposite layout drawn", loc="left", fontsize=11)
    return whole


def draw_circuit(
    ax: Axes, sets: pd.DataFrame, images: pd.DataFrame, paths: pd.DataFrame, colors: Mapping[str, tuple[float, ...]]
) -> None:
    """Lines from words: share of gain². Lines to the layout: turned layouts lost without the head."""
    ax.set(xlim=(-0.42, 3.3), ylim=(-0.3, 1.12))
    ax.set_axis_off()
    levels = dict(zip(colors, np.linspace(0.95, 0.05, len(colors)) if len(colors) > 1 else [0.5], strict=True))
    means = images.groupby("condition")[list(TURNS.values())].mean()
    for axis, level in HEIGHT.items():
        box(ax, 0, level, WORDS[axis])
        box(ax, 2.05, level, PLACES[axis])
        ax.annotate("", (2.78, 0.5), (2.36, level), arrowprops={"arrowstyle": "-|>", "color": "0.4"})
        own = sets[sets["axis"] == axis]
        for head, share in zip(map(str, own["head"]), own["share"].to_numpy(float), strict=True):
            ax.plot([0.28, 0.92], [level, levels[head]], color=colors[head], linewidth=0.4 + WIDEST * share, zorder=1)
        for head, at in levels.items():
            lost = float(means[TURNS[axis]]["set"]) - float(means[TURNS[axis]][f"without {head}"])
            if lost > 0.02:
                ax.plot([1.08, 1.76], [at, level], color=colors[head], linewidth=0.4 + WIDEST * lost, zorder=1)
    for head, at in levels.items():
        ax.scatter([1], [at], s=620, color=[colors[head]], zorder=2)
        ax.text(1, at, head, ha="center", va="center", fontsize=9, color="white", fontweight="bold", zorder=3)
    box(ax, 3, 0.5, "objects")
    through = paths.groupby("frozen", sort=False)["lost"].mean()
    told = "; ".join(f"{kind} {value:.2f}" for kind, value in through.items())
    ax.text(-0.4, -0.3, f"share of the turn that is lost where one part behind\nis frozen: {told}", va="bottom", fontsize=9)
    for x, what in ((0.6, "share of gain²"), (1.42, "lost without it")):
        ax.text(x, 1.08, what, ha="center", fontsize=9, style="italic")


def box(ax: Axes, x: float, y: float, text: str) -> None:
    """A labelled node."""
    ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox={"boxstyle": "round", "facecolor": "white"}, zorder=3)


def draw_bars(ax: Axes, images: pd.DataFrame, colors: Mapping[str, tuple[float, ...]]) -> None:
    """Share of images with the opposite layout by condition."""
    rows: list[tuple[str, Interval, object]] = []
    names = {"none": "none", "set": "all", **{f"without {head}": f"without {head}" for head in colors}}
    names |= {"random": "random sets", "steps 0-3": "all, steps 0–3", "steps 4-13": "all, steps 4–13"}
    for condition, label in names.items():
        part = images[images["condition"].str.startswith(condition) & (images["both_colors"] == 1)]
        if len(part):
            color: object = colors.get(condition.removeprefix("without "), "black")
            rows.append((label, proportion(part["layout_opposite"].to_numpy(float)), color))
    for i, (_, found, color) in enumerate(rows):
        ax.errorbar(
            found.mean,
            i,
            xerr=[[found.mean - found.low], [found.high - found.mean]],
            fmt="o",
            color=color,
            capsize=3,
        )
    ax.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=10)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=10)
    ax.grid(axis="x", color="0.9")
