"""Positions of an image's two colors, whatever shapes they have.

A relation metric that needs both shapes also falls when a shape is not drawn. The layout uses
colors alone, so it separates a changed relation from a lost object. It has a verdict for each axis,
because networks may read the two axes by different heads from different words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from .judge import MIN_AREA, color_classes
from .scene import BAND, COLORS, DIRECTIONS, Relation, Scene

Axis = Literal["vertical", "horizontal", "diagonal"]

LAYOUT_DESCRIPTIONS = {
    "dx": (
        "offset of the first-named object's colour from the other's, x to the right; NaN where a "
        "colour is missing"
    ),
    "dy": "the same, y down",
    "x_sign": (
        "1, −1 or 0 (level): on which side the first-named object's colour is; NaN where a colour "
        "is missing"
    ),
    "y_sign": "the same, y down",
    "layout": (
        "the first-named object's colour is beyond the other's in every direction that the "
        "relation names"
    ),
}
"""The `description` attribute of each variable of `layout`'s Dataset."""


def axis_of(relation: Relation) -> Axis:
    """Axis of a relation.

    Example:
        >>> axis_of("above"), axis_of("upper_left")
        ('vertical', 'diagonal')
    """
    x, y = DIRECTIONS[relation]
    return "diagonal" if x and y else "horizontal" if x else "vertical"


def layout(images: Float[Tensor, "image 3 height width"], scenes: Sequence[Scene]) -> xr.Dataset:
    """Judge images by the positions of red and blue alone, independently of shapes.

    The position of a color is the centre of the bounding box of its largest region.

    Returns:
        Variables over dim `image`: `dx dy` (pixels), `x_sign y_sign` (float), `layout` (bool); each
        has its `LAYOUT_DESCRIPTIONS` entry. Coordinates: `relation`, `axis` (`axis_of`).

    Example:
        >>> drawn = scenes.sample(4, seed=0)
        >>> bool(layout(scenes.render(drawn), drawn)["layout"].all())
        True
    """
    places = np.array(
        [
            [_place(classes == 1 + i) for i in range(len(COLORS))]
            for classes in color_classes(images)
        ]
    )
    places = places.reshape(len(scenes), len(COLORS), 2)
    row = np.arange(len(scenes))
    first, second = (
        np.array([COLORS.index(getattr(s, which)) for s in scenes], int)
        for which in ("color1", "color2")
    )
    offset = places[row, first] - places[row, second]
    sign = np.where(np.isnan(offset), np.nan, np.sign(offset) * (np.abs(offset) > BAND))
    named = np.array([DIRECTIONS[s.relation] for s in scenes], float).reshape(-1, 2)
    right = ((named == 0) | (sign == named)).all(axis=1) & ~np.isnan(offset).any(axis=1)
    values = {
        "dx": offset[:, 0],
        "dy": offset[:, 1],
        "x_sign": sign[:, 0],
        "y_sign": sign[:, 1],
        "layout": right,
    }
    return xr.Dataset(
        {
            name: ("image", value, {"description": LAYOUT_DESCRIPTIONS[name]})
            for name, value in values.items()
        },
        coords={
            "image": row,
            "relation": ("image", np.array([s.relation for s in scenes], str)),
            "axis": ("image", np.array([axis_of(s.relation) for s in scenes], str)),
        },
    )


def _place(mask: Bool[np.ndarray, "height width"]) -> tuple[float, float]:
    """Centre (x, y) of the largest region's bounding box; NaN for fewer than `MIN_AREA` pixels."""
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())[1:]
    if not len(areas) or areas.max() < MIN_AREA:
        return np.nan, np.nan
    rows, columns = np.nonzero(labels == 1 + areas.argmax())
    return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
