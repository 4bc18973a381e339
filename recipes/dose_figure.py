"""The figure of `improve_relations`: the changes by every dose of every method."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_lens import viz
from dit_lens.stats import Interval

COLORS = {"relation_loose": "C3", "unique_binding": "C0", "color": "C2", "shape": "C1"}


@viz.style.styled
def dose_figure(
    table: pd.DataFrame, templates: Mapping[str, str], neutral: Mapping[str, float]
) -> Figure:
    """Change of every verdict by dose, a row a task and a column a method; the chosen dose on
    held-out prompts beside it.

    Args:
        table: of `improve_relations.paired`, with columns model (the task) and phase, "choosing" or
            "reporting".
        templates: of the prompts, by task.
        neutral: the dose that changes nothing, by method; the columns.
    """
    names = list(templates)
    figure, axes = plt.subplots(
        len(names),
        len(neutral),
        figsize=(9.6, 2.7 * len(names) + 0.9),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, name in zip(axes, names, strict=True):
        for ax, method in zip(row, neutral, strict=True):
            rows = table[(table["model"] == name) & (table["method"] == method)]
            draw_curves(ax, rows[rows["phase"] == "choosing"], neutral[method])
            draw_reported(
                ax,
                rows[rows["phase"] == "reporting"],
                0.03 * (rows["dose"].max() - neutral[method]),
            )
            ax.axhline(0, color=viz.style.INK, linewidth=0.6)
        row[0].set_ylabel(f"{name}\n“{templates[name]}”:\nchange (paired)")
    for ax, method in zip(axes[0], neutral, strict=True):
        ax.set_title(method)
    for ax, label in zip(
        axes[-1],
        ("× heads' output", "× heads' scores", "× effect vector", "guidance weight"),
        strict=True,
    ):
        ax.set_xlabel(label)
    figure.suptitle(best_dose(table))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def best_dose(table: pd.DataFrame) -> str:
    """The largest change of the relation on held-out prompts, in words."""
    told = table[(table["phase"] == "reporting") & (table["verdict"] == "relation_loose")]
    best = told[told["kind"] == "circuit"].sort_values("mean").iloc[-1]
    found = Interval(best["mean"], best["low"], best["high"])
    return f"Relation on held-out prompts, at best: {best['method']} in {best['model']}, {found}"


def draw_curves(ax: Axes, rows: pd.DataFrame, neutral: float) -> None:
    """The doses tried: every verdict of the circuit, and the relation of the controls where they
    were run.
    """
    # nested, as curves often coincide
    widths = {"color": 6.0, "shape": 4.5, "unique_binding": 3.0, "relation_loose": 1.5}
    for verdict, width in widths.items():
        for kind, style in (("circuit", "-"), ("control", ":")):
            curve = rows[(rows["verdict"] == verdict) & (rows["kind"] == kind)].sort_values("dose")
            if len(curve) and (verdict == "relation_loose" or kind == "circuit"):
                label = (
                    f"{verdict.replace('_loose', '').replace('_', ' ')}, {kind}, training prompts"
                )
                x, y = [neutral, *curve["dose"]], [0.0, *curve["mean"]]
                pale = 1.0 if verdict == "relation_loose" else 0.45
                ax.plot(
                    x, y, style, color=COLORS[verdict], linewidth=width, alpha=pale, label=label
                )


def draw_reported(ax: Axes, rows: pd.DataFrame, apart: float) -> None:
    """The chosen dose on held-out prompts, with intervals: relation and binding of circuit and
    control, side by side.
    """
    shown = (
        ("relation_loose", "circuit", -1.5),
        ("relation_loose", "control", -0.5),
        ("unique_binding", "circuit", 0.5),
    )
    for verdict, kind, places in (*shown, ("unique_binding", "control", 1.5)):
        found = rows[(rows["verdict"] == verdict) & (rows["kind"] == kind)].iloc[0]
        viz.intervals(
            ax,
            [Interval(found["mean"], found["low"], found["high"])],
            [found["dose"] + places * apart],
            upright=True,
            fmt="D" if kind == "circuit" else "o",
            color=COLORS[verdict],
            markerfacecolor=COLORS[verdict] if kind == "circuit" else "none",
            zorder=5,
            label=f"{verdict.replace('_loose', '').replace('_', ' ')}, {kind}, held-out prompts",
        )
