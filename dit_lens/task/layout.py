"""Where an image's two colors lie, whatever shapes they have: did the relation change, or was an object lost?

A relation that needs both shapes also falls when a shape is not drawn. The layout knows colors alone, so it tells these apart,
and it has a verdict for each axis, because networks may read the two axes by different heads from different words.
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
    "dx": "offset of the first-named object's colour from the other's, x to the right; NaN where a colour is missing",
    "dy": "the same, y down",
    "x_sign": "1, −1 or 0 (level): on which side the first-named object's colour is; NaN where a colour is missing",
    "y_sign": "the same, y down",
    "layout": "the first-named object's colour is beyond the other's in every direction that the relation names",
}
"""What each variable of `layout`'s Dataset says (its `description` attribute)."""


def axis_of(relation: Relation) -> Axis:
    """Which axis a relation is on.

    Example:
        >>> axis_of("above"), axis_of("upper_left")
        ('vertical', 'diagonal')
    """
    x, y = DIRECTIONS[relation]
    return "diagonal" if x and y else "horizontal" if x else "vertical"


def layout(images: Float[Tensor, "image 3 height width"], scenes: Sequence[Scene]) -> xr.Dataset:
    """Judge images by the places of red and blue alone: a verdict an image, blind to shapes.

    A color's place is the centre of the bounding box of its largest region. Variables over dim `image`: `dx dy` (pixels),
    `x_sign y_sign` (float), `layout` (bool); each carries its `LAYOUT_DESCRIPTIONS` entry. Coordinates: `relation`, `axis`
    (`axis_of`).

    Example:
        >>> from dit_lens import scenes
        >>> wanted = scenes.sample(4, seed=0)
        >>> bool(layout(scenes.render(wanted), wanted)["layout"].all())
        True
    """
    places = np.array([[_place(classes == 1 + i) for i in range(len(COLORS))] for classes in color_classes(images)])
    places = places.reshape(len(scenes), len(COLORS), 2)
    row = np.arange(len(scenes))
    first, second = (np.array([COLORS.index(getattr(s, which)) for s in scenes], int) for which in ("color1", "color2"))
    offset = places[row, first] - places[row, second]
    sign = np.where(np.isnan(offset), np.nan, np.sign(offset) * (np.abs(offset) > BAND))
    named = np.array([DIRECTIONS[s.relation] for s in scenes], float).reshape(-1, 2)
    right = ((named == 0) | (sign == named)).all(axis=1) & ~np.isnan(offset).any(axis=1)
    values = {"dx": offset[:, 0], "dy": offset[:, 1], "x_sign": sign[:, 0], "y_sign": sign[:, 1], "layout": right}
    return xr.Dataset(
        {name: ("image", value, {"description": LAYOUT_DESCRIPTIONS[name]}) for name, value in values.items()},
        coords={
            "image": row,
            "relation": ("image", np.array([s.relation for s in scenes], str)),
            "axis": ("image", np.array([axis_of(s.relation) for s in scenes], str)),
        },
    )


def _place(mask: Bool[np.ndarray, "height width"]) -> tuple[float, float]:
    """(x, y) of the middle of the largest region's bounding box; NaN where it has fewer than `MIN_AREA` pixels."""
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())[1:]
    if not len(areas) or areas.max() < MIN_AREA:
        return np.nan, np.nan
    rows, columns = np.nonzero(labels == 1 + areas.argmax())
    return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
