"""Image groups of a synopsis: the image tokens that show each object, from pixels."""

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
    """Share of each object and of the background in each image token, by the judge's color classes.

    An object with fewer pixels than the judge's `MIN_AREA` is absent: its group is empty. Other
    faults of an object (a wrong shape, or a second region of its color) do not matter: all pixels
    of its color count.

    Args:
        images: in [0, 1].
        scenes: the scenes of the prompts. Groups are then "object1", "object2" and "background"; by
            default, one for each color and "background".
        grid: rows and columns of image tokens.
        threshold: by default, groups are shares that add up to 1 at every token. With a threshold
            they are booleans: a token belongs to each object that covers at least this share of it,
            and to the background if no object does (an object may span patches without covering
            half of any).

    Raises:
        ValueError: scenes and images differ in number, or the images do not divide into the grid.

    Example:
        >>> from dit_lens.task import sample
        >>> groups = image_groups_from_images(render(sample(2, seed=0)))
        >>> {name: tuple(group.shape) for name, group in groups.items()}
        {'red': (2, 64), 'blue': (2, 64), 'background': (2, 64)}
    """
    height, width = images.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(
            f"Images of {height} × {width} pixels do not divide into {grid[0]} × {grid[1]} tokens: "
            "say grid=…."
        )
    if scenes is not None and len(scenes) != len(images):
        raise ValueError(f"There are {len(scenes)} scenes for {len(images)} images: give one each.")
    by_color = _color_shares(images, grid)
    objects: dict[str, Tensor] = {
        str(color): share for color, share in zip(COLORS, by_color, strict=True)
    }
    if scenes is not None:
        row = torch.arange(len(scenes))
        objects = {
            f"object{i}": by_color[
                [COLORS.index(getattr(scene, f"color{i}")) for scene in scenes], row
            ]
            for i in (1, 2)
        }
    if threshold is None:
        return {**objects, "background": 1 - torch.stack(list(objects.values())).sum(dim=0)}
    covered = {name: share >= threshold for name, share in objects.items()}
    return {**covered, "background": ~torch.stack(list(covered.values())).any(dim=0)}


def _color_shares(
    images: Float[Tensor, "image 3 height width"], grid: tuple[int, int]
) -> Float[Tensor, "color image pos"]:
    """Share of each color in each image token; 0 for a color with too few pixels."""
    classes = torch.from_numpy(color_classes(images))
    shares = []
    for number, _ in enumerate(COLORS, start=1):
        area = classes == number
        area = area & (area.sum(dim=(1, 2), keepdim=True) >= MIN_AREA)
        pattern = "n (r p) (c q) -> n (r c)"
        shares.append(reduce(area.float(), pattern, "mean", r=grid[0], c=grid[1]))
    return torch.stack(shares)


def image_groups_from_scenes(
    scenes: Sequence[Scene], grid: tuple[int, int] = (8, 8), threshold: float | None = None
) -> dict[str, Float[Tensor, "image pos"]] | dict[str, Bool[Tensor, "image pos"]]:
    """Apply `image_groups_from_images` to the scenes' own images.

    A prompt leaves positions open, so a generated image has its objects elsewhere. These groups are
    for runs that start from a scene's image, and for analyses of the ground truth.

    Example:
        >>> from dit_lens.task import sample
        >>> groups = image_groups_from_scenes(sample(2, seed=0), threshold=0.25)
        >>> groups["object1"].sum(dim=1).tolist()
        [4, 3]
    """
    return image_groups_from_images(render(scenes), scenes, grid, threshold)
