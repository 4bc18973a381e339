"""Images of scenes: no anti-aliasing and no noise, so one scene has exactly one image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from .scene import IMAGE_SIZE, RADIUS, Color, Scene, Shape, Trio

BACKGROUND = (128, 128, 128)
PIXELS: dict[Color, tuple[int, int, int]] = {"red": (255, 0, 0), "blue": (0, 0, 255)}
PALETTE = np.array([BACKGROUND, *PIXELS.values()], dtype=np.float32) / 255


@cache
def shape_mask(shape: Shape) -> Bool[np.ndarray, "height width"]:
    """Pixels of one shape inside its own bounding box.

    Both sides are odd, so the box has a centre pixel. Circle and square span 2·RADIUS + 1 = 33
    pixels; the triangle is equilateral with side 32 and 29 rows (the height 27.7 rounded up to an
    odd number of rows).

    Example:
        >>> shape_mask("square").shape, shape_mask("triangle").shape
        ((33, 33), (29, 33))
    """
    side = 2 * RADIUS
    height = 28 if shape == "triangle" else side
    canvas = Image.new("1", (side + 1, height + 1))
    draw = ImageDraw.Draw(canvas)
    match shape:
        case "triangle":
            draw.polygon([(RADIUS, 0), (0, height), (side, height)], fill=1)
        case "circle":
            draw.ellipse([0, 0, side, height], fill=1)
        case "square":
            draw.rectangle([0, 0, side, height], fill=1)
    return np.asarray(canvas)


def half_size(shape: Shape) -> tuple[int, int]:
    """Half the bounding box's (width, height) in pixels: the box spans centre ± this, inclusive."""
    rows, columns = shape_mask(shape).shape
    return columns // 2, rows // 2


def render(scenes: Sequence[Scene | Trio]) -> Float[Tensor, "image 3 height width"]:
    """Draw scenes: RGB in [0, 1], 128 × 128.

    If objects overlap (natural distribution only), the later covers the earlier.

    Example:
        >>> render(scenes.sample(2, seed=0)).shape
        torch.Size([2, 3, 128, 128])
    """
    paint = np.zeros((len(scenes), IMAGE_SIZE, IMAGE_SIZE), dtype=np.intp)
    for canvas, scene in zip(paint, scenes, strict=True):
        for shape, color, x, y in scene.objects:
            dx, dy = half_size(shape)
            canvas[y - dy : y + dy + 1, x - dx : x + dx + 1][shape_mask(shape)] = 1 + list(
                PIXELS
            ).index(color)
    return torch.from_numpy(np.stack([channel.take(paint) for channel in PALETTE.T], axis=1))
