"""Figure of a relation head: its attention during denoising, and the score maps of its weights."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .figures import bare
from .style import DIVERGING, SEQUENTIAL, WIDEST, styled


@styled
def relation_head_figure(
    head: str,
    prompts: Sequence[str],
    images: Float[Tensor, "prompt 3 height width"],
    attention: xr.DataArray,
    weight_maps: Mapping[str, xr.DataArray],
) -> Figure:
    """Rows of (prompt, image, attention to the relation words at some steps).

    Below, position-by-word maps of the weights.

    Args:
        head: name in the titles.
        prompts: labels of the rows.
        images: in [0, 1], one a prompt.
        attention: dims (prompt, step, y, x), attention mass on the relation words; drawn on one
            scale from 0.
        weight_maps: word → (y, x) score map; each is centred and drawn on one symmetric scale.

    Example:
        >>> grid = xr.DataArray([[[[0.1, 0.2], [0.3, 0.4]]]], dims=("prompt", "step", "y", "x"))
        >>> grid, images = grid.assign_coords(step=[0]), torch.zeros(1, 3, 8, 8)
        >>> weights = {"above": grid[0, 0]}
        >>> type(
        ...     relation_head_figure("L2H1", ["circle above square"], images, grid, weights)
        ... ).__name__
        'Figure'
    """
    steps = attention.sizes["step"]
    columns = 1 + steps
    figure = plt.figure(
        figsize=(min(1.4 * columns, WIDEST), 1.95 * len(prompts) + 2.9), layout="constrained"
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.95 * len(prompts) + 0.6, 2.3])
    upper, lower = parts
    upper.suptitle(f"{head}: attention to the relation words while denoising")
    grid = upper.subplots(len(prompts), columns, squeeze=False)
    top = float(attention.max())
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        bare(grid[row, 0]).imshow(image.permute(1, 2, 0).float().cpu().numpy())
        grid[row, 0].set_title(textwrap.fill(prompt, 17), fontsize=9)
        for column, step in enumerate(attention["step"].values):
            ax = bare(grid[row, 1 + column])
            drawn = ax.imshow(
                attention.isel(prompt=row, step=column), vmin=0, vmax=top, cmap=SEQUENTIAL
            )
            if row == 0:
                ax.set_title(f"step {step}")
    upper.colorbar(drawn, ax=grid[:, 1:], shrink=0.6, label="attention mass")

    lower.suptitle(f"{head}: position code × word, from weights alone (no image, no timestep)")
    row_of_maps = lower.subplots(1, len(weight_maps), squeeze=False)[0]
    centred = {word: m - m.mean() for word, m in weight_maps.items()}
    reach = max(float(abs(m).max()) for m in centred.values())
    for ax, (word, values) in zip(row_of_maps, centred.items(), strict=True):
        drawn = bare(ax).imshow(values, vmin=-reach, vmax=reach, cmap=DIVERGING)
        ax.set_title(word)
    lower.colorbar(drawn, ax=row_of_maps, shrink=0.8, label="score, centred")
    return figure
