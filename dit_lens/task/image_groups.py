"""Which image tokens show which object: the image groups of a synopsis, from pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from . import COLORS, Scene, render
from .judge import MIN_AREA, color_classes


def image_groups_from_images(
    images: Float[Tensor, "image 3 height width"],
    scenes: Sequence[Scene] | None = None,
    grid: tuple[int, int] = (8, 8),
    threshold: float | None = None,
) -> dict[str, Float[Tensor, "image pos"]] | dict[str, Bool[Tensor, "image pos"]]:
    """Each image token's share of every object and of the background, by the evaluator's own judgement of pixels' colors.

    An object of less than the evaluator's smallest area is not there: its group is empty. Where something else is wrong with
    an object (its shape, say, or its color appears twice), the pixels of its color still count.

    Args:
        images: in [0, 1].
        scenes: what the images should show. Groups are then "object1", "object2" and "background", else one for each color and
            "background".
        grid: rows and columns of image tokens.
        threshold: None for shares, which add up to 1 at every token; else tokens belong to an object that covers at least this
            share of them, and to the background if to none (an object may span patches without covering half of any).

    Raises:
        ValueError: there is not one scene for each image, or patches are no whole pixels.
    """
    height, width = images.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"Images of {height} × {width} pixels do not divide into {grid[0]} × {grid[1]} tokens: say grid=….")
    if scenes is not None and len(scenes) != len(images):
        raise ValueError(f"There are {len(scenes)} scenes for {len(images)} images: give one each.")
    classes = torch.from_numpy(color_classes(images))
    areas = {color: classes == 1 + i for i, color in enumerate(COLORS)}
    areas = {color: area & (area.sum(dim=(1, 2), keepdim=True) >= MIN_AREA) for color, area in areas.items()}
    shares = {
        color: reduce(area.float(), "n (r p) (c q) -> n (r c)", "mean", r=grid[0], c=grid[1]) for color, area in areas.items()
    }
    objects: dict[str, Tensor] = {str(color): share for color, share in shares.items()}
    if scenes is not None:
        by_color = torch.stack([shares[color] for color in COLORS])
        row = torch.arange(len(scenes))
        objects = {f"object{i}": by_color[[COLORS.index(getattr(scene, f"color{i}")) for scene in scenes], row] for i in (1, 2)}
    if threshold is None:
        return {**objects, "background": 1 - torch.stack(list(objects.values())).sum(dim=0)}
    covered = {name: share >= threshold for name, share in objects.items()}
    return {**covered, "background": ~torch.stack(list(covered.values())).any(dim=0)}


def image_groups_from_scenes(
    scenes: Sequence[Scene], grid: tuple[int, int] = (8, 8), threshold: float | None = None
) -> dict[str, Float[Tensor, "image pos"]] | dict[str, Bool[Tensor, "image pos"]]:
    """As `image_groups_from_images`, of the scenes' own images.

    A prompt leaves positions open: a generated image shows its objects elsewhere. These are the groups of runs that start from
    a scene's image, or of analyses of the ground truth.
    """
    return image_groups_from_images(render(scenes), scenes, grid, threshold)
