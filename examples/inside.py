"""A task of one's own: one shape inside of another, or bigger than another, in four colors at 64
pixels.

    python -m examples.inside --out runs/inside

See docs/extending/task.md. Nothing of the package is edited: `Inside` has the members of
`dit_lens.task.Task`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from dit_lens.training import TrainConfig, train

SHAPES = ("disc", "box", "diamond")
COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.7, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 0.9, 0.0),
}
RELATIONS = {"inside": "inside", "bigger": "bigger than"}
SIDE, BACKGROUND = 64, 0.5
SMALL, LARGE = range(5, 8), range(13, 17)
"""Half the width of an object, in pixels."""


@dataclass(frozen=True)
class Pair:
    """Object 1, which the prompt names first, and object 2: (shape, color) and (x, y, half the
    width).
    """

    first: tuple[str, str]
    second: tuple[str, str]
    relation: str
    places: tuple[tuple[int, int, int], tuple[int, int, int]]


KINDS = [
    (first, second, relation)
    for first, second in itertools.product(itertools.product(SHAPES, COLORS), repeat=2)
    for relation in RELATIONS
    if first[1] != second[1]
]
HELD_OUT = frozenset(KINDS[::11])
"""Combinations that are never trained; 11 divides into no period of the list, so each part occurs
elsewhere.
"""


class Inside:
    """The task."""

    name = "inside"
    image_size = SIDE
    words = (*SHAPES, *COLORS, "is", "inside", "bigger", "than")
    metrics = ("color", "shape", "relation")
    contrasts: dict[str, tuple[str, str]] = {}  # noqa: RUF012  (no two phrases of equal length are opposites)

    def sample(
        self, n: int, seed: int, *, start: int = 0, split: str = "train", step: int | None = None
    ) -> list[Pair]:
        """Pair i of a seed depends on (seed, i) alone."""
        kinds = [
            kind for kind in KINDS if split == "all" or (kind in HELD_OUT) == (split == "held_out")
        ]
        found = []
        for index in range(start, start + n):
            rng = np.random.default_rng((seed, index))
            first, second, relation = kinds[rng.integers(len(kinds))]
            found.append(Pair(first, second, relation, _places(rng, relation)))
        return found

    def prompt(self, scene: Pair) -> str:
        """Such as "red disc is inside blue box"."""
        (shape1, color1), (shape2, color2) = scene.first, scene.second
        return f"{color1} {shape1} is {RELATIONS[scene.relation]} {color2} {shape2}"

    def prompts(self) -> list[str]:
        """One for each of `KINDS`."""
        nowhere = ((0, 0, 0), (0, 0, 0))
        return [self.prompt(Pair(*kind, nowhere)) for kind in KINDS]

    def render(self, scenes: Sequence[Pair]) -> Float[Tensor, "image 3 height width"]:
        """Object 2 first: object 1 may lie inside of it."""
        images = torch.full((len(scenes), 3, SIDE, SIDE), BACKGROUND)
        for image, scene in zip(images, scenes, strict=True):
            for (shape, color), place in (
                (scene.second, scene.places[1]),
                (scene.first, scene.places[0]),
            ):
                image[:, torch.from_numpy(_mask(shape, *place))] = torch.tensor(COLORS[color])[
                    :, None
                ]
        return images

    def judge(
        self, images: Float[Tensor, "image 3 height width"], scenes: Sequence[Pair]
    ) -> xr.Dataset:
        """Each object is what has its color; its shape is the one that fills its bounding box to
        the same share.
        """
        rows = [
            _verdict(image, scene)
            for image, scene in zip(images.float().cpu(), scenes, strict=True)
        ]
        values = np.array(rows, dtype=bool).reshape(-1, len(self.metrics))
        return xr.Dataset(
            {name: ("image", column) for name, column in zip(self.metrics, values.T, strict=True)}
        )

    def roles(self, scene: Pair) -> dict[str, str]:
        """The objects, as they are named, and the phrase."""
        (shape1, color1), (shape2, color2) = scene.first, scene.second
        return {
            "object1": f"{color1} {shape1}",
            "relation": RELATIONS[scene.relation],
            "object2": f"{color2} {shape2}",
        }


def _places(
    rng: np.random.Generator, relation: str
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    small, large = int(rng.choice(SMALL)), int(rng.choice(LARGE))
    y = rng.integers(large + 1, SIDE - large - 1, size=2)
    if relation == "inside":
        x = int(rng.integers(large + 1, SIDE - large - 1))
        return (x, int(y[0]), min(small, large // 2 - 1)), (x, int(y[0]), large)
    left = int(rng.integers(large + 1, SIDE - large - 2 * SMALL[-1] - 3))
    right = int(rng.integers(left + large + small + 2, SIDE - small - 1))
    bigger, smaller = (left, int(y[0]), large), (right, int(y[1]), small)
    if rng.random() < 0.5:
        bigger, smaller = ((SIDE - 1 - x, y, half) for x, y, half in (bigger, smaller))
    return bigger, smaller


def _mask(shape: str, x: int, y: int, half: int) -> Bool[np.ndarray, "height width"]:
    rows, columns = np.abs(np.arange(SIDE) - y)[:, None], np.abs(np.arange(SIDE) - x)[None]
    match shape:
        case "box":
            return np.maximum(rows, columns) <= half
        case "diamond":
            return rows + columns <= half
        case _:
            return rows**2 + columns**2 <= half**2 + half / 2


def _verdict(image: Float[Tensor, "3 height width"], scene: Pair) -> tuple[bool, bool, bool]:
    """Color, shape and relation."""
    palette = torch.tensor([(BACKGROUND,) * 3, *COLORS.values()])
    nearest = (image.movedim(0, -1)[..., None, :] - palette).square().sum(-1).argmin(-1).numpy()
    drawn = [nearest == 1 + list(COLORS).index(color) for _, color in (scene.first, scene.second)]
    if min(mask.sum() for mask in drawn) < 20:
        return False, False, False
    boxes = [_box(mask) for mask in drawn]
    (top1, bottom1, left1, right1), (top2, bottom2, left2, right2) = boxes
    inside = top2 < top1 and bottom1 < bottom2 and left2 < left1 and right1 < right2
    # an object that covers the middle of another hides a part of its shape
    whole = [drawn[0], drawn[0] | drawn[1] if inside else drawn[1]]
    shapes = all(
        _shape(mask) == shape
        for mask, (shape, _) in zip(whole, (scene.first, scene.second), strict=True)
    )
    apart = right1 < left2 or right2 < left1 or bottom1 < top2 or bottom2 < top1
    bigger = apart and right1 - left1 > 1.3 * (right2 - left2)
    return True, shapes, inside if scene.relation == "inside" else bigger


def _box(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max(), columns.min(), columns.max()


def _shape(mask: Bool[np.ndarray, "height width"]) -> str:
    top, bottom, left, right = _box(mask)
    share = mask.sum() / ((bottom - top + 1) * (right - left + 1))
    return "box" if share > 0.9 else "disc" if share > 0.67 else "diamond"


def main(out: Path, steps: int = 1500, size: Literal["nano", "micro"] = "nano") -> None:
    """Train a model on the task; the same command goes on with a run that was stopped."""
    train(TrainConfig(out, size, steps=steps, decay_from=0.6, evaluate_every=250), Inside())


if __name__ == "__main__":
    tyro.cli(main)
