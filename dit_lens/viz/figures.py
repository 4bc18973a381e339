"""Figures for papers and notebooks, each from a labelled result of this package. All return a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

DIVERGING, SEQUENTIAL = "RdBu_r", "magma"


def bare(ax: Axes) -> Axes:
    """The axes without ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def head_step_map(values: xr.DataArray, label: str = "", top: int | None = None) -> Figure:
    """Heads × steps as a heat map; numbers of either sign get a diverging scale around 0, all others start at 0.

    Args:
        values: dims layer, head, step and nothing else (average over prompts first); NaN stays white.
        label: what the numbers are.
        top: only so many heads, those with the largest values in magnitude; heads keep the model's order.

    Raises:
        ValueError: `values` has other dims.
    """
    if set(values.dims) != {"layer", "head", "step"}:
        raise ValueError(f"head_step_map needs dims layer, head and step, not {', '.join(map(str, values.dims))}.")
    table = values.stack(name=("layer", "head")).transpose("name", "step")
    if top is not None:
        strongest = abs(table).max("step").fillna(-1).argsort().values[::-1][:top]
        table = table.isel(name=np.sort(strongest))
    steps = [str(step) for step in table["step"].values]
    figure, ax = plt.subplots(figsize=(1.6 + 0.34 * len(steps), 1.1 + 0.2 * table.sizes["name"]), layout="constrained")
    reach = float(np.nanmax(abs(table.values))) or 1.0
    signed = bool((table < 0).any())
    drawn = ax.imshow(
        table.values, aspect="auto", cmap=DIVERGING if signed else SEQUENTIAL, vmin=-reach if signed else 0, vmax=reach
    )
    ax.set_xticks(range(len(steps)), steps)
    ax.set_yticks(range(table.sizes["name"]), [f"L{layer}H{head}" for layer, head in table["name"].values], fontsize=8)
    ax.set_xlabel("denoising step")
    figure.colorbar(drawn, ax=ax, label=label)
    return figure


def word_maps(
    maps: Float[Tensor, "text_pos pos"] | Float[np.ndarray, "text_pos pos"],
    tokens: Sequence[str],
    image: Float[Tensor, "3 height width"],
    title: str = "",
) -> Figure:
    """Where one head looks for each word of a prompt: maps over the image, on one scale from 0.

    Args:
        maps: attention of every position to every token (a pattern's [query key], transposed); a square, rows first.
        tokens: as `model.to_str_tokens(prompt)`.

    Raises:
        ValueError: there are not as many maps as tokens.
    """
    values = np.asarray(maps, dtype=float)
    if len(values) != len(tokens):
        raise ValueError(f"There are {len(values)} maps for {len(tokens)} tokens.")
    side = int(values.shape[1] ** 0.5)
    columns = min(len(tokens) + 1, 8)
    rows = -(-(len(tokens) + 1) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.5 * columns + 0.7, 1.75 * rows + 0.3), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    axes = [bare(ax) for ax in grid.ravel()]
    picture = image.detach().permute(1, 2, 0).float().cpu().numpy()
    axes[0].imshow(picture)
    axes[0].set_title("image", fontsize=9)
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
        ax.set_title(token.removeprefix("▁"), fontsize=9)
    for ax in axes[1 + len(tokens) :]:
        ax.axis("off")
    figure.colorbar(drawn, ax=grid, shrink=0.7, label="attention")
    return figure


def ramp_gallery(
    maps: Mapping[str, Mapping[str, xr.DataArray]], title: str = "position code × word, from weights alone"
) -> Figure:
    """Position-by-word score maps: a row a head, a column a word; each row is centred and has a symmetric scale of its own.

    Args:
        maps: head → word → map with dims (y, x), as `circuits.position_word_map` gives them.
    """
    words = list(dict.fromkeys(word for row in maps.values() for word in row))
    figure, grid = plt.subplots(
        len(maps), len(words), figsize=(1.25 * len(words) + 1.2, 1.3 * len(maps) + 0.5), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    for number, (axes, (head, row)) in enumerate(zip(grid, maps.items(), strict=True)):
        centred = {word: values - values.mean() for word, values in row.items()}
        reach = max(float(abs(values).max()) for values in centred.values())
        for ax, word in zip(axes, words, strict=True):
            bare(ax)
            if word in centred:
                drawn = ax.imshow(centred[word].transpose("y", "x"), vmin=-reach, vmax=reach, cmap=DIVERGING)
            if number == 0:
                ax.set_title(word.replace("_", " "), fontsize=9)
        axes[0].set_ylabel(head, fontsize=9)
        figure.colorbar(drawn, ax=axes, shrink=0.85, label="score, centred" if len(maps) == 1 else "")
    return figure


def variance_bars(parts: Mapping[str, pd.DataFrame] | pd.DataFrame, column: str = "r2_partial") -> Figure:
    """Shares of variance by factor, a group of bars for every term and a bar for every table.

    Args:
        parts: one `variance.partition`, or several by name ("before projection" → …).
        column: which of its columns; terms with NaN (aliased) are marked.
    """
    tables = {"": parts} if isinstance(parts, pd.DataFrame) else dict(parts)
    terms = [term for term in next(iter(tables.values())).index if term not in ("residual", "total")]
    figure, ax = plt.subplots(figsize=(1.6 + 0.7 * len(terms), 3), layout="constrained")
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
                fontsize=7,
            )
    ax.set_xticks(range(len(terms)), terms, rotation=30, ha="right")
    ax.set_ylabel(column.replace("r2", "R²").replace("partial_eta2", "partial η²").replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    if "" not in tables:
        ax.legend(frameon=False)
    return figure


def dose_response_curves(
    table: pd.DataFrame, metrics: Sequence[str] = ("target_loose", "original_loose", "unique_binding")
) -> Figure:
    """`steering.summarise`: each metric against the dose, steered and controls, with 95 % bands."""
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if "−" not in kind]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(2.9 * len(metrics), 2.8), layout="constrained", squeeze=False, sharey=True
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        for kind in kinds:
            rows = table[(table["kind"] == kind) & (table["metric"] == metric)].sort_values("k")
            (line,) = ax.plot(rows["k"], rows["mean"], marker="o", markersize=3, label=kind.replace("_", " "))
            ax.fill_between(rows["k"], rows["low"], rows["high"], alpha=0.2, color=line.get_color(), linewidth=0)
        ax.set_title(metric.replace("_", " "), fontsize=10)
        ax.set_xlabel("dose k")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of images")
    axes[0][0].set_ylim(-0.02, 1.02)
    axes[0][-1].legend(frameon=False, fontsize=8)
    return figure


def learning_curves(table: pd.DataFrame, heads: Mapping[str, Sequence[tuple[int, int]]]) -> Figure:
    """A run's `dynamics.parquet`: accuracies and the layout dipole above, screening of some heads below, by samples seen.

    Args:
        heads: source of the screening ("words", "shape1", "shape2") → (layer, head) of those to draw; a panel each.
    """
    figure, axes = plt.subplots(1 + len(heads), 1, figsize=(7, 2.6 * (1 + len(heads))), sharex=True, layout="constrained")
    axes = np.atleast_1d(axes)
    labels = {"color": "colour", "shape": "shape", "unique_binding": "binding", "relation_loose": "relation", "dipole": "dipole"}
    for quantity, label in labels.items():
        rows = table[table["quantity"] == quantity].sort_values("samples")
        style = {"color": "black", "linestyle": "--"} if quantity == "dipole" else {}
        (line,) = axes[0].plot(rows["samples"], rows["value"], marker=".", label=label, **style)
        axes[0].fill_between(rows["samples"], rows["low"], rows["high"], alpha=0.15, color=line.get_color(), linewidth=0)
    axes[0].set_ylabel("share of images\n(dipole: cosine)")
    for ax, (source, chosen) in zip(axes[1:], heads.items(), strict=True):
        for layer, head in chosen:
            of_head = (table["source"] == source) & (table["layer"] == layer) & (table["head"] == head)
            rows = table[of_head & (table["quantity"] == "projection")].sort_values("samples")
            ax.plot(rows["samples"], rows["value"], marker=".", label=f"L{layer}H{head}")
        ax.axhline(0, color="grey", linewidth=0.6)
        ax.set_ylabel(f"projection on ramps\n({source})")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("samples seen")
    return figure
