"""Figures for papers and notebooks, each from a labelled result of this package.

All return a matplotlib Figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..stats import Interval
from .style import DIVERGING, INK, SEQUENTIAL, WIDEST, head_color, styled


def bare(ax: Axes) -> Axes:
    """Remove the ticks of axes, and return them.

    Example:
        >>> len(bare(plt.figure().subplots()).get_xticks())
        0
    """
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def intervals(
    ax: Axes,
    found: Iterable[Interval],
    at: Iterable[int | float] | None = None,
    *,
    upright: bool = False,
    **look: Any,
) -> None:
    """Draw means with their intervals, a row each, or upright, a column each.

    Args:
        ax: axes to draw on.
        found: means with low and high ends, in the order of rows.
        at: places of the rows; 0, 1, … by default.
        upright: columns with vertical intervals instead of rows.
        look: options of `Axes.errorbar`.

    Example:
        >>> ax = plt.figure().subplots()
        >>> intervals(ax, [Interval(0.5, 0.4, 0.7)], label="shape")
        >>> ax.get_legend_handles_labels()[1]
        ['shape']
    """
    mean, low, high = np.array(list(found), dtype=float).reshape(-1, 3).T
    places, error = np.arange(len(mean)) if at is None else list(at), [mean - low, high - mean]
    options: dict[str, Any] = {"fmt": "o", "markersize": 4, "elinewidth": 1} | look
    if upright:
        ax.errorbar(places, mean, yerr=error, **options)
    else:
        ax.errorbar(mean, places, xerr=error, **options)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows 0, 1, … of axes, from above; names of heads in the heads' colors.

    Example:
        >>> ax = plt.figure().subplots()
        >>> name_rows(ax, ["L2H1", "all heads"])
        >>> ax.get_yticklabels()[0].get_color() == head_color("L2H1")
        True
    """
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    for label in ax.get_yticklabels():
        if head := re.fullmatch(r"(?:cross_attn\.)?(L\d+H\d+)(?:\.[qkv])?", label.get_text()):
            label.set_color(head_color(head[1]))


@styled
def head_step_map(values: xr.DataArray, label: str = "", top: int | None = None) -> Figure:
    """Heat map of heads × steps.

    Signed values get a diverging scale around 0, others a scale from 0.

    Args:
        values: dims layer, head, step and nothing else (average over prompts first); NaN stays
            white.
        label: name and unit of the values.
        top: number of heads to draw, those with the largest absolute values; heads keep the model's
            order.

    Raises:
        ValueError: `values` has other dims.

    Example:
        >>> values = xr.DataArray(np.ones((2, 3, 4)), dims=("layer", "head", "step"))
        >>> values = values.assign_coords(layer=range(2), head=range(3), step=range(4))
        >>> len(head_step_map(values, top=2).axes[0].get_yticks())
        2
    """
    if set(values.dims) != {"layer", "head", "step"}:
        raise ValueError(
            "head_step_map needs dims layer, head and step, not "
            f"{', '.join(map(str, values.dims))}."
        )
    table = values.stack(name=("layer", "head")).transpose("name", "step")
    if top is not None:
        strongest = abs(table).max("step").fillna(-1).argsort().values[::-1][:top]
        table = table.isel(name=np.sort(strongest))
    steps = [str(step) for step in table["step"].values]
    figure, ax = plt.subplots(
        figsize=(min(1.6 + 0.34 * len(steps), WIDEST), 1.1 + 0.2 * table.sizes["name"]),
        layout="constrained",
    )
    reach = float(np.nanmax(abs(table.values))) or 1.0
    signed = bool((table < 0).any())
    drawn = ax.imshow(
        table.values,
        aspect="auto",
        cmap=DIVERGING if signed else SEQUENTIAL,
        vmin=-reach if signed else 0,
        vmax=reach,
    )
    ax.set_xticks(range(len(steps)), steps)
    name_rows(ax, [f"L{layer}H{head}" for layer, head in table["name"].values])
    ax.set_xlabel("denoising step")
    figure.colorbar(drawn, ax=ax, label=label)
    return figure


@styled
def word_maps(
    maps: Float[Tensor, "text_pos pos"] | Float[np.ndarray, "text_pos pos"],
    tokens: Sequence[str],
    image: Float[Tensor, "3 height width"],
    title: str = "",
) -> Figure:
    """Attention of one head to each token of a prompt: maps over the image, on one scale from 0.

    Args:
        maps: attention of every position to every token (a pattern's [query key], transposed);
            positions of a square image, row by row.
        tokens: as `model.to_str_tokens(prompt)`.
        image: drawn first, and in gray below each map.
        title: title of the whole figure; none by default.

    Raises:
        ValueError: maps and tokens differ in number.

    Example:
        >>> figure = word_maps(np.ones((2, 16)), ["▁red", "▁circle"], torch.zeros(3, 32, 32))
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['image', 'red', 'circle']
    """
    values = np.asarray(maps, dtype=float)
    if len(values) != len(tokens):
        raise ValueError(f"There are {len(values)} maps for {len(tokens)} tokens.")
    side = int(values.shape[1] ** 0.5)
    columns = min(len(tokens) + 1, 6)
    rows = -(-(len(tokens) + 1) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.5 * columns + 0.7, 1.75 * rows + 0.3),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title)
    axes = [bare(ax) for ax in grid.ravel()]
    picture = image.detach().permute(1, 2, 0).float().cpu().numpy()
    axes[0].imshow(picture)
    axes[0].set_title("image")
    height, width = picture.shape[:2]
    for ax, token, map_ in zip(axes[1:], tokens, values, strict=False):
        ax.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        drawn = ax.imshow(
            map_.reshape(side, side),
            cmap=SEQUENTIAL,
            vmin=0,
            vmax=values.max(),
            alpha=0.8,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        ax.set_title(token.removeprefix("▁"))
    for ax in axes[1 + len(tokens) :]:
        ax.axis("off")
    figure.colorbar(drawn, ax=grid, shrink=0.7, label="attention")
    return figure


@styled
def ramp_gallery(
    maps: Mapping[str, Mapping[str, xr.DataArray]],
    title: str = "position code × word, from weights alone",
) -> Figure:
    """Position-by-word score maps: one row a head, one column a word.

    Each row is centred, with its own symmetric scale.

    Args:
        maps: head → word → map with dims (y, x), from `circuits.position_word_map`.
        title: title of the whole figure.

    Example:
        >>> values = xr.DataArray(np.eye(4), dims=("y", "x"))
        >>> ramp_gallery({"L2H1": {"above": values, "below": -values}}).axes[0].get_ylabel()
        'L2H1'
    """
    words = list(dict.fromkeys(word for row in maps.values() for word in row))
    figure, grid = plt.subplots(
        len(maps),
        len(words),
        figsize=(min(1.25 * len(words) + 1.2, WIDEST), 1.3 * len(maps) + 0.5),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title)
    for number, (axes, (head, row)) in enumerate(zip(grid, maps.items(), strict=True)):
        centred = {word: values - values.mean() for word, values in row.items()}
        reach = max(float(abs(values).max()) for values in centred.values())
        for ax, word in zip(axes, words, strict=True):
            bare(ax)
            if word in centred:
                drawn = ax.imshow(
                    centred[word].transpose("y", "x"), vmin=-reach, vmax=reach, cmap=DIVERGING
                )
            if number == 0:
                ax.set_title(word.replace("_", " "))
        axes[0].set_ylabel(head)
        figure.colorbar(
            drawn, ax=axes, shrink=0.85, label="score, centred" if len(maps) == 1 else ""
        )
    return figure


@styled
def variance_bars(
    parts: Mapping[str, pd.DataFrame] | pd.DataFrame, column: str = "r2_partial"
) -> Figure:
    """Shares of variance by factor: one group of bars for each term, one bar for each table.

    Args:
        parts: one `variance.partition`, or several by name ("before projection" → …).
        column: a column of the tables; terms with NaN (aliased) are marked.

    Example:
        >>> table = pd.DataFrame({"r2_partial": [0.7, 0.2]}, index=["shape2", "relation"])
        >>> [text.get_text() for text in variance_bars(table).axes[0].get_xticklabels()]
        ['shape2', 'relation']
    """
    tables = {"": parts} if isinstance(parts, pd.DataFrame) else dict(parts)
    terms = [
        term for term in next(iter(tables.values())).index if term not in ("residual", "total")
    ]
    figure, ax = plt.subplots(
        figsize=(min(1.6 + 0.8 * len(terms), WIDEST), 3.4), layout="constrained"
    )
    width = 0.8 / len(tables)
    for number, (name, table) in enumerate(tables.items()):
        values = table[column].reindex(terms).to_numpy(dtype=float)
        places = np.arange(len(terms)) + (number - (len(tables) - 1) / 2) * width
        ax.bar(places, np.nan_to_num(values), width, label=name)
        for place, value in zip(places, values, strict=True):
            ax.annotate(
                "aliased" if np.isnan(value) else f"{value:.2f}",
                (place, np.nan_to_num(value)),
                ha="center",
                va="bottom",
                fontsize=9,
                rotation=90 if len(tables) > 1 else 0,
                xytext=(0, 2),
                textcoords="offset points",
            )
    ax.set_xticks(range(len(terms)), terms, rotation=90)
    ax.set_ylabel(
        column.replace("r2", "R²").replace("partial_eta2", "partial η²").replace("_", " ")
    )
    if "" not in tables:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@styled
def dose_response_curves(
    table: pd.DataFrame,
    metrics: Sequence[str] = ("target_loose", "original_loose", "unique_binding"),
) -> Figure:
    """Curves of `steering.summarise`.

    Each metric against the dose, steered and controls, with 95 % bands.

    Example:
        >>> rows = [("steered", k, "unique_binding", 1 - k, 0.9 - k, 1.0) for k in (0.0, 0.5)]
        >>> table = pd.DataFrame(rows, columns=["kind", "k", "metric", "mean", "low", "high"])
        >>> dose_response_curves(table, ["unique_binding"]).axes[0].get_title()
        'unique binding'
    """
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if "−" not in kind]
    figure, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(min(2.9 * len(metrics), WIDEST), 2.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        for kind in kinds:
            rows = table[(table["kind"] == kind) & (table["metric"] == metric)].sort_values("k")
            (line,) = ax.plot(
                rows["k"], rows["mean"], marker="o", markersize=3, label=kind.replace("_", " ")
            )
            ax.fill_between(
                rows["k"], rows["low"], rows["high"], alpha=0.2, color=line.get_color(), linewidth=0
            )
        ax.set_title(metric.replace("_", " "))
        ax.set_xlabel("dose k")
    axes[0][0].set_ylabel("share of images")
    axes[0][0].set_ylim(-0.02, 1.02)
    axes[0][-1].legend()
    return figure


@styled
def learning_curves(
    table: pd.DataFrame, heads: Mapping[str, Sequence[tuple[int, int]]], title: str = ""
) -> Figure:
    """Curves of a run's `dynamics.parquet`, by samples seen.

    Accuracies and the layout dipole above, screening of heads below.

    Args:
        table: columns quantity, samples, value, low, high, source, layer, head.
        heads: source of the screening ("words", "shape1", "shape2") → (layer, head) of the heads to
            draw; one panel each.
        title: title of the whole figure; none by default.

    Example:
        >>> names = ["quantity", "samples", "value", "low", "high", "source", "layer", "head"]
        >>> rows = [("color", n, 0.5, 0.4, 0.6, "", 0, 0) for n in (10, 100)]
        >>> len(learning_curves(pd.DataFrame(rows, columns=names), {"words": [(2, 1)]}).axes)
        2
    """
    figure, axes = plt.subplots(
        1 + len(heads), 1, figsize=(7, 2.6 * (1 + len(heads))), sharex=True, layout="constrained"
    )
    axes = np.atleast_1d(axes)
    labels = {
        "color": "colour",
        "shape": "shape",
        "unique_binding": "binding",
        "relation_loose": "relation",
        "dipole": "dipole",
    }
    for quantity, label in labels.items():
        rows = table[table["quantity"] == quantity].sort_values("samples")
        style = {"color": INK, "linestyle": "--"} if quantity == "dipole" else {}
        (line,) = axes[0].plot(rows["samples"], rows["value"], marker=".", label=label, **style)
        axes[0].fill_between(
            rows["samples"],
            rows["low"],
            rows["high"],
            alpha=0.15,
            color=line.get_color(),
            linewidth=0,
        )
    axes[0].set_ylabel("share of images\n(dipole: cosine)")
    for ax, (source, chosen) in zip(axes[1:], heads.items(), strict=True):
        for layer, head in chosen:
            of_head = (
                (table["source"] == source) & (table["layer"] == layer) & (table["head"] == head)
            )
            rows = table[of_head & (table["quantity"] == "projection")].sort_values("samples")
            ax.plot(
                rows["samples"],
                rows["value"],
                marker=".",
                label=f"L{layer}H{head}",
                color=head_color((layer, head)),
            )
        ax.axhline(0, color=INK, linewidth=0.6)
        ax.set_ylabel(f"projection on ramps\n({source})")
    for ax in axes:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("samples seen")
    figure.suptitle(title)
    return figure
