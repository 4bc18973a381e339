"""Endless sequences of scenes, each scene a pure function of a seed and an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, TypedDict, TypeVar, Unpack, get_args

import numpy as np
from jaxtyping import Int

from hooked_models.arguments import integer, number, one_of

from .rendering import half_size
from .scene import (
    BAND,
    CENTRE_RANGE,
    COMBINATIONS,
    DIRECTIONS,
    HELD_OUT,
    PHRASES,
    RELATIONS,
    Color,
    Combination,
    Relation,
    Scene,
    other_color,
    relation_between,
)

T = TypeVar("T")
Split = Literal["train", "held_out", "all"]
Distribution = Literal["balanced", "natural"]
ColorWords = Literal["optional", "both"]

CHUNK = 64
"""Number of scenes that share a random generator, so that `sample(n, seed)` is a prefix of
`sample(m > n, seed)`.
"""
LARGEST_SEED, MOST_SCENES = 2**64 - 1, 10**8
ANCHOR_OFFSET = 28
"""Pixels from the image's centre to an object in the eight layouts of `spread=0`."""


class Balance(TypedDict, total=False):
    """Keyword arguments of `sample` that only a "balanced" distribution has.

    Attributes:
        spread: curriculum in [0, 1]: 0 keeps both objects within 2 px of eight fixed layouts, 1
            (the default) is the whole distribution.
        red_first: probability that the red object is named first; 0.5 by default.
        without: a relation to leave out.
    """

    spread: float
    red_first: float
    without: Relation | None


def sample(
    n: int,
    seed: int,
    *,
    start: int = 0,
    split: Split = "train",
    distribution: Distribution = "balanced",
    color_words: ColorWords = "optional",
    **balance: Unpack[Balance],
) -> list[Scene]:
    """Draw the scenes with indices `start` … `start + n − 1` of the endless sequence of `seed`.

    Args:
        n: number of scenes.
        seed: seed of the sequence.
        start: index of the first.
        split: "train" leaves out the combinations of `HELD_OUT`, "held_out" draws only those.
        distribution: "balanced" draws the relation uniformly, and positions uniformly among those
            that realise it without overlap; "natural" is the original's (paper, data set
            `objectRel_pilot2`): both centres uniform, relation derived, overlap allowed.
        color_words: "optional" names each color with probability one half, as in the original
            training set.
        **balance: `spread`, `red_first` and `without` of a balanced distribution; see `Balance`.

    Raises:
        ValueError: an option is unknown, or `spread` or `red_first` lies outside of [0, 1].

    Example:
        >>> from dit_lens.task import caption
        >>> for scene in sample(2, seed=0, color_words="both"):
        ...     print(caption(scene))
        red circle is diagonally down and left from blue square
        red triangle is diagonally up and right from blue square
    """
    spread = number("spread", balance.get("spread", 1.0), 0, 1)
    red_first = number("red_first", balance.get("red_first", 0.5), 0, 1)
    without = balance.get("without")
    seed = integer("seed", seed, 0, LARGEST_SEED)
    one_of("split", split, get_args(Split))
    one_of("distribution", distribution, get_args(Distribution))
    one_of("color_words", color_words, get_args(ColorWords))

    def draw(chunk: int) -> list[Scene]:
        rng = np.random.default_rng((seed, chunk))
        pool = (
            _natural(rng, split)
            if distribution == "natural"
            else _balanced(rng, split, spread, red_first, without)
        )
        return [_describe(rng, combination, row, color_words) for combination, row in pool]

    return window(n, start, draw)


def window(n: int, start: int, draw: Callable[[int], Sequence[T]]) -> list[T]:
    """Items `start` … `start + n − 1` of an endless sequence.

    `draw(i)` gives its i-th chunk of `CHUNK` items.
    """
    n, start = integer("n", n, 0, MOST_SCENES), integer("start", start, 0, LARGEST_SEED)
    found: list[T] = []
    for chunk in range(start // CHUNK, -(-(start + n) // CHUNK)):
        found += draw(chunk)[max(start - chunk * CHUNK, 0) : start + n - chunk * CHUNK]
    return found


def _describe(
    rng: np.random.Generator,
    combination: Combination,
    centres: tuple[int, int, int, int],
    color_words: ColorWords,
) -> Scene:
    phrases = PHRASES[combination.relation]
    phrase = phrases[rng.integers(len(phrases))]
    named = rng.random(2) < 0.5 if color_words == "optional" else (True, True)
    x1, y1, x2, y2 = centres
    return Scene(
        combination.shape1,
        combination.color1,
        x1,
        y1,
        combination.shape2,
        other_color(combination.color1),
        x2,
        y2,
        combination.relation,
        phrase,
        bool(named[0]),
        bool(named[1]),
    )


def allowed(split: Split) -> tuple[Combination, ...]:
    """The combinations of a split."""
    if split == "all":
        return COMBINATIONS
    return tuple(c for c in COMBINATIONS if (c in HELD_OUT) == (split == "held_out"))


@cache
def _candidates(split: Split, relation: Relation, color1: Color) -> tuple[Combination, ...]:
    cells = [c for c in allowed(split) if c.relation == relation]
    # "held_out" lacks some color orders
    return tuple(c for c in cells if c.color1 == color1) or tuple(cells)


def _balanced(
    rng: np.random.Generator,
    split: Split,
    spread: float,
    red_first: float,
    without: Relation | None,
) -> list[tuple[Combination, tuple[int, int, int, int]]]:
    pool = []
    relations = [relation for relation in RELATIONS if relation != without]
    for r in rng.integers(len(relations), size=CHUNK):
        relation = relations[r]
        candidates = _candidates(split, relation, "red" if rng.random() < red_first else "blue")
        combination = candidates[rng.integers(len(candidates))]
        # rounding keeps the number of cached tables small while a curriculum moves
        pool.append((combination, _place(rng, combination, round(spread, 2))))
    return pool


def _place(rng: np.random.Generator, c: Combination, spread: float) -> tuple[int, int, int, int]:
    """Uniform among centres that realise the relation without overlap, by rejection.

    More than half are accepted.
    """
    direction_x, direction_y = DIRECTIONS[c.relation]
    columns, rows = _centre_pairs(direction_x, spread), _centre_pairs(direction_y, spread)
    (w1, h1), (w2, h2) = half_size(c.shape1), half_size(c.shape2)
    while True:
        x1, x2 = columns[rng.integers(len(columns))]
        y1, y2 = rows[rng.integers(len(rows))]
        if abs(x1 - x2) > w1 + w2 or abs(y1 - y2) > h1 + h2:
            return int(x1), int(y1), int(x2), int(y2)


@cache
def _centre_pairs(direction: int, spread: float) -> Int[np.ndarray, "pair 2"]:
    """Coordinates of both centres along one axis that realise a direction.

    `direction`: the sign of first − second beyond `BAND`; 0 for level within `BAND`.
    """
    low, high = CENTRE_RANGE
    first, second = (
        a.ravel()
        for a in np.meshgrid(np.arange(low, high + 1), np.arange(low, high + 1), indexing="ij")
    )
    difference = first - second
    keep = np.abs(difference) <= BAND if direction == 0 else difference * direction > BAND
    middle = (low + high) // 2
    reach = 2 + spread * (high - low)
    keep &= np.abs(first - (middle + direction * ANCHOR_OFFSET)) <= reach
    keep &= np.abs(second - (middle - direction * ANCHOR_OFFSET)) <= reach
    return np.stack([first[keep], second[keep]], axis=1)


def _natural(
    rng: np.random.Generator, split: Split
) -> list[tuple[Combination, tuple[int, int, int, int]]]:
    pool: list[tuple[Combination, tuple[int, int, int, int]]] = []
    accepted = frozenset(allowed(split))
    while len(pool) < CHUNK:
        x1, y1, x2, y2 = (
            int(v) for v in rng.integers(CENTRE_RANGE[0], CENTRE_RANGE[1] + 1, size=4)
        )
        cell = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        combination = Combination(
            cell.shape1, cell.shape2, cell.color1, relation_between(x1, y1, x2, y2)
        )
        if combination in accepted:
            pool.append((combination, (x1, y1, x2, y2)))
    return pool
