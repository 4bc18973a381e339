"""The paper's judge, reimplemented, for comparison with ours on the same images.

Source: Wang, Fan, Pan (arXiv 2601.06338), `cv2_eval_utils.py`: threshold each channel, approximate
contours by polygons, name shapes by the number of vertices. Two of its habits are kept because they
make the difference: a triangle's centre is taken with a theoretical height, about one pixel too
high; a stray region counts as an object of the shape that its outline has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from .scene import BAND, DIRECTIONS, RADIUS, Scene, relation_between

BRIGHT = 180
"""Pixels of a channel above this value (of 255) belong to an object."""
SMALLEST = 100
"""Square pixels: a contour with less area is dropped."""
TOLERANCE = 0.04
"""Largest distance of a contour from its polygon, as a share of the contour's length."""


VERDICTS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose")
PLACES = ("x1", "y1", "x2", "y2")


class Found(NamedTuple):
    """Object found by the paper's detector."""

    shape: str
    color: str
    x: int
    y: int


def paper_verdicts(
    images: Float[Tensor, "image 3 height width"], scenes: Sequence[Scene]
) -> xr.Dataset:
    """Judge images by the paper's rules.

    Returns:
        `VERDICTS` (bool) and `PLACES` (pixels; NaN without unique binding) over dim `image`.

    Example:
        >>> drawn = scenes.sample(4, seed=0)
        >>> bool(paper_verdicts(scenes.render(drawn), drawn)["unique_binding"].all())
        True
    """
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().numpy()
    rows = [
        _judge(detect_objects(image), scene) for image, scene in zip(pixels, scenes, strict=True)
    ]
    table = np.array(rows, float).reshape(-1, len(VERDICTS) + len(PLACES))
    verdicts = {name: ("image", table[:, i].astype(bool)) for i, name in enumerate(VERDICTS)}
    return xr.Dataset(
        verdicts | {name: ("image", table[:, len(VERDICTS) + i]) for i, name in enumerate(PLACES)}
    )


def _judge(objects: Sequence[Found], scene: Scene) -> tuple[int | float, ...]:
    color = {scene.color1, scene.color2} <= {found.color for found in objects}
    shape = {scene.shape1, scene.shape2} <= {found.shape for found in objects}
    first, second = (
        [found for found in objects if (found.shape, found.color) == pair]
        for pair in ((scene.shape1, scene.color1), (scene.shape2, scene.color2))
    )
    if len(first) != 1 or len(second) != 1:
        return (color, shape, False, False, False, *[np.nan] * len(PLACES))
    a, b = first[0], second[0]
    strict = relation_between(a.x, a.y, b.x, b.y) == scene.relation
    offsets = zip((a.x - b.x, a.y - b.y), DIRECTIONS[scene.relation], strict=True)
    loose = all(way == 0 or offset * way > BAND for offset, way in offsets)
    return color, shape, True, strict, loose, a.x, a.y, b.x, b.y


def detect_objects(image: Float[np.ndarray, "3 height width"]) -> list[Found]:
    """All objects of an image with values from 0 to 255, channel by channel."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    found = []
    for channel in range(3):
        bright = (pixels[..., channel] > BRIGHT).astype(np.uint8)
        for contour in cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
            if cv2.contourArea(contour) < SMALLEST:
                continue
            vertices = len(
                cv2.approxPolyDP(contour, TOLERANCE * cv2.arcLength(contour, True), True)
            )
            x, y, width, height = cv2.boundingRect(contour)
            tall = height if vertices != 3 else RADIUS * 3**0.5
            shape = {3: "triangle", 4: "square" if abs(width - height) < 5 else "rectangle"}.get(
                vertices, "circle"
            )
            inside = cv2.drawContours(np.zeros_like(bright), [contour], -1, 1, -1)
            color = _color(np.array(cv2.mean(pixels, inside)[:3]))
            found.append(Found(shape, color, x + width // 2, y + int(tall // 2)))
    return found


def _color(mean: Float[np.ndarray, " 3"]) -> str:
    red, green, blue = mean
    if red > 230 and max(green, blue) < 25:
        return "red"
    return "blue" if blue > 230 and max(red, green) < 25 else "unknown"
