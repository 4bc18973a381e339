"""Endless sequences of trios (`scene.Trio`), each trio a pure function of a seed and an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from hooked_models.arguments import integer, one_of

from .rendering import half_size
from .sampling import CHUNK, LARGEST_SEED, Split, window
from .scene import (
    BAND,
    CENTRE_RANGE,
    COLORS,
    DIRECTIONS,
    HELD_OUT,
    PHRASES,
    RELATIONS,
    SHAPES,
    Combination,
    Relation,
    Scene,
    Shape,
    Trio,
    other_color,
)

ATTEMPTS = 50
"""Draws of centres before a trio is drawn anew."""

TRIO_PHRASES: dict[Relation, tuple[str, ...]] = {
    relation: tuple(phrase for phrase in phrases if " and " not in phrase)
    for relation, phrases in PHRASES.items()
}
"""The 14 phrases without "and", which stands between a prompt's relations alone."""


def sample_trios(n: int, seed: int, *, start: int = 0, split: Split = "train") -> list[Trio]:
    """Draw the trios with indices `start` … `start + n − 1` of the endless sequence of `seed`.

    The two relations differ, the centres realise both, and no two objects overlap or touch.

    Args:
        n: number of scenes.
        seed: seed of the sequence.
        start: index of the first.
        split: "train" leaves out the combinations of `HELD_OUT` in both relations; in "held_out"
            the first relation makes one of them.

    Example:
        >>> from dit_lens.task import caption
        >>> caption(sample_trios(1, seed=0)[0])
        'red triangle is right of blue circle and to the lower left of blue square'
    """
    one_of("split", split, get_args(Split))
    seed = integer("seed", seed, 0, LARGEST_SEED)

    def draw(chunk: int) -> list[Trio]:
        rng = np.random.default_rng((seed, chunk, 3))
        return [_draw(rng, split) for _ in range(CHUNK)]

    return window(n, start, draw)


def _draw(rng: np.random.Generator, split: Split) -> Trio:
    while True:
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
        relations = [RELATIONS[i] for i in rng.choice(len(RELATIONS), 2, replace=False)]
        color1, color3 = (COLORS[i] for i in rng.integers(len(COLORS), size=2))
        held_out = [
            Combination(shapes[0], s, color1, r) in HELD_OUT
            for s, r in zip(shapes[1:], relations, strict=True)
        ]
        if (split == "train" and any(held_out)) or (split == "held_out" and not held_out[0]):
            continue
        centres = _place(rng, shapes, relations)
        # Little room for this pair of relations: draw anew, which makes such pairs slightly rarer.
        if centres is None:
            continue
        scenes = []
        for i, color in ((1, other_color(color1)), (2, color3)):
            phrases = TRIO_PHRASES[relations[i - 1]]
            phrase = phrases[rng.integers(len(phrases))]
            scenes.append(
                Scene(
                    shapes[0],
                    color1,
                    *centres[0],
                    shapes[i],
                    color,
                    *centres[i],
                    relations[i - 1],
                    phrase,
                )
            )
        return Trio(*scenes)


def _place(
    rng: np.random.Generator,
    shapes: Sequence[Shape],
    relations: Sequence[Relation],
) -> list[tuple[int, int]] | None:
    """Centres of the three objects, or None if all attempts fail."""
    low, high = CENTRE_RANGE
    sizes = [half_size(shape) for shape in shapes]
    for _ in range(ATTEMPTS):
        x, y = (int(v) for v in rng.integers(low, high + 1, size=2))
        centres = [(x, y)]
        for relation in relations:
            columns, rows = (
                _across(at, direction)
                for at, direction in zip((x, y), DIRECTIONS[relation], strict=True)
            )
            if columns[0] >= columns[1] or rows[0] >= rows[1]:
                break
            centres.append((int(rng.integers(*columns)), int(rng.integers(*rows))))
        if len(centres) == len(shapes) and all(
            # objects of one color that touch would be one region
            abs(x1 - x2) > w1 + w2 + 1 or abs(y1 - y2) > h1 + h2 + 1
            for i, ((x1, y1), (w1, h1)) in enumerate(zip(centres, sizes, strict=True))
            for (x2, y2), (w2, h2) in zip(centres[:i], sizes[:i], strict=True)
        ):
            return centres
    return None


def _across(at: int, direction: int) -> tuple[int, int]:
    """Range (first, beyond last) of the other object's coordinate, if the first is at `at`."""
    low, high = CENTRE_RANGE
    if direction == 0:
        return max(low, at - BAND), min(high, at + BAND) + 1
    return (low, at - BAND) if direction > 0 else (at + BAND + 1, high + 1)
