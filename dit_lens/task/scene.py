"""Scenes: two colored shapes, the relation between them, and the prompt that describes it.

Source: Wang, Fan, Pan, *Circuit Mechanisms for Spatial Relation Generation in Diffusion
Transformers* (arXiv 2601.06338), data set `objectRel_pilot2`. Two things differ on purpose: objects
do not overlap, and an object's centre is the centre of the bounding box that is drawn (the
original's triangles sit 4.6 px low, which costs left/right accuracy on perfect images).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hooked_models.arguments import integer, one_of

Shape = Literal["triangle", "circle", "square"]
Color = Literal["red", "blue"]
Relation = Literal[
    "above", "below", "left", "right", "upper_left", "upper_right", "lower_left", "lower_right"
]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

IMAGE_SIZE = 128
RADIUS = 16
CENTRE_RANGE = (17, 111)
"""Smallest and largest pixel coordinate of a centre, both inclusive."""
BAND = 5
"""Pixels: two centres that differ by at most this along an axis are level on it."""

# Unit steps from the second object to the first; y points down.
DIRECTIONS: dict[Relation, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "upper_left": (-1, -1),
    "upper_right": (1, -1),
    "lower_left": (-1, 1),
    "lower_right": (1, 1),
}

PHRASES: dict[Relation, tuple[str, ...]] = {
    "above": ("above", "directly above", "higher than"),
    "below": ("below", "directly below", "lower than"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "upper_left": (
        "to the upper left of",
        "above and to the left of",
        "diagonally up and left from",
    ),
    "upper_right": (
        "to the upper right of",
        "above and to the right of",
        "diagonally up and right from",
    ),
    "lower_left": (
        "to the lower left of",
        "below and to the left of",
        "diagonally down and left from",
    ),
    "lower_right": (
        "to the lower right of",
        "below and to the right of",
        "diagonally down and right from",
    ),
}
"""The 22 phrases of the training set."""

OPPOSITE = {
    relation: next(r for r, d in DIRECTIONS.items() if d == (-x, -y))
    for relation, (x, y) in DIRECTIONS.items()
}
"""above ↔ below, upper_left ↔ lower_right, …: every phrase has a counterpart word by word."""

WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            *SHAPES,
            *COLORS,
            "is",
            *itertools.chain(*(p.split() for ps in PHRASES.values() for p in ps)),
        }
    )
)
"""All words of the captions."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Ground truth of one image. Object 1 is the one named first in the caption.

    Positions are pixel coordinates of bounding-box centres, x to the right and y down.

    Example:
        >>> scene = Scene("circle", "red", 64, 40, "square", "blue", 64, 90, "above", "above")
        >>> scene.combination
        Combination(shape1='circle', shape2='square', color1='red', relation='above')
        >>> scene.objects
        (('circle', 'red', 64, 40), ('square', 'blue', 64, 90))
    """

    shape1: Shape
    color1: Color
    x1: int
    y1: int
    shape2: Shape
    color2: Color
    x2: int
    y2: int
    relation: Relation
    phrase: str
    names_color1: bool = True
    names_color2: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for shapes, colors or relations that the task lacks.

        A relation that the coordinates contradict is allowed: that is how a scene names the
        relation that it does not show (`opposite`).
        """
        for name in ("shape1", "shape2"):
            one_of(name, getattr(self, name), SHAPES)
        for name in ("color1", "color2"):
            one_of(name, getattr(self, name), COLORS)
        one_of("relation", self.relation, RELATIONS)
        for name in ("x1", "y1", "x2", "y2"):
            integer(name, getattr(self, name), 0, IMAGE_SIZE)

    @property
    def combination(self) -> Combination:
        """Compositional cell of the scene; see `HELD_OUT`."""
        return Combination(self.shape1, self.shape2, self.color1, self.relation)

    @property
    def objects(self) -> tuple[tuple[Shape, Color, int, int], ...]:
        """(shape, color, x, y) of each object, in the order of the caption."""
        return (self.shape1, self.color1, self.x1, self.y1), (
            self.shape2,
            self.color2,
            self.x2,
            self.y2,
        )


@dataclass(frozen=True, slots=True)
class Trio:
    """Three objects and two relations, as two scenes that share object 1.

    Object 3 is the second object of `second`. Beyond the original, whose images hold two objects.
    All three shapes differ; object 2 has the other color than object 1, object 3 has either; the
    caption names both colors ("red circle is above blue square and left of red triangle").

    Example:
        >>> first = Scene("circle", "red", 64, 40, "square", "blue", 64, 90, "above", "above")
        >>> second = Scene("circle", "red", 64, 40, "triangle", "red", 100, 40, "left", "left of")
        >>> caption(Trio(first, second))
        'red circle is above blue square and left of red triangle'
    """

    first: Scene
    second: Scene

    @property
    def objects(self) -> tuple[tuple[Shape, Color, int, int], ...]:
        """(shape, color, x, y) of each object, in the order of the caption."""
        return (*self.first.objects, self.second.objects[1])


@dataclass(frozen=True, slots=True)
class Combination:
    """One of 96 cells: ordered pair of shapes, first color (the second is the other one), relation.

    Example:
        >>> len(COMBINATIONS), Combination("triangle", "circle", "red", "above") in HELD_OUT
        (96, True)
    """

    shape1: Shape
    shape2: Shape
    color1: Color
    relation: Relation


COMBINATIONS: tuple[Combination, ...] = tuple(
    Combination(s1, s2, c1, r)
    for (s1, s2), c1, r in itertools.product(itertools.permutations(SHAPES, 2), COLORS, RELATIONS)
)

HELD_OUT: frozenset[Combination] = frozenset(
    {
        # Each relation at least once, five of either color order, no ordered pair of shapes more
        # than twice: every part of a held-out combination is common in training, only the whole is
        # new.
        Combination("triangle", "circle", "red", "above"),
        Combination("circle", "triangle", "blue", "below"),
        Combination("square", "circle", "blue", "left"),
        Combination("circle", "square", "red", "right"),
        Combination("square", "triangle", "red", "upper_left"),
        Combination("triangle", "square", "blue", "upper_right"),
        Combination("circle", "square", "blue", "lower_left"),
        Combination("triangle", "square", "red", "lower_right"),
        Combination("circle", "triangle", "red", "left"),
        Combination("square", "circle", "blue", "above"),
    }
)
"""The 10 combinations left out of the training of every model of this project."""


def other_color(color: Color) -> Color:
    """Color of the other object: a scene always holds one red and one blue object.

    Example:
        >>> other_color("red")
        'blue'
    """
    return "blue" if color == "red" else "red"


def relation_between(x1: int, y1: int, x2: int, y2: int) -> Relation:
    """Relation of object 1 to object 2, by the original's rule.

    Vertical if level within `BAND` on x, else horizontal if level on y, else diagonal.

    Example:
        >>> relation_between(64, 40, 66, 90), relation_between(40, 40, 90, 90)
        ('above', 'upper_left')
    """
    dx, dy = x1 - x2, y1 - y2
    if abs(dx) <= BAND:
        return "above" if dy < 0 else "below"
    if abs(dy) <= BAND:
        return "left" if dx < 0 else "right"
    if dy < 0:
        return "upper_left" if dx < 0 else "upper_right"
    return "lower_left" if dx < 0 else "lower_right"


def opposite(scene: Scene) -> Scene:
    """Scene of the opposite relation, at the same positions.

    In the counterpart phrase of equal length.

    Example:
        >>> scene = Scene("circle", "red", 64, 40, "square", "blue", 64, 90, "above", "higher than")
        >>> caption(opposite(scene))
        'red circle is lower than blue square'
    """
    relation = OPPOSITE[scene.relation]
    return replace(
        scene,
        relation=relation,
        phrase=PHRASES[relation][PHRASES[scene.relation].index(scene.phrase)],
    )


def caption(scene: Scene | Trio, phrase: str | None = None) -> str:
    """Prompt of a scene: `"[color1] shape1 is PHRASE [color2] shape2"`.

    A trio's prompt goes on with `"and PHRASE color3 shape3"`.

    Args:
        scene: a color that the scene does not name (`names_color1`, `names_color2`) is left out.
        phrase: replaces the scene's own phrase (the first one of a trio). A phrase of another
            relation is allowed: it makes a corrupted prompt.

    Example:
        >>> scene = Scene("circle", "red", 64, 40, "square", "blue", 64, 90, "above", "above")
        >>> caption(scene), caption(scene, "left of")
        ('red circle is above blue square', 'red circle is left of blue square')
    """
    if isinstance(scene, Trio):
        return (
            f"{caption(scene.first, phrase)} and {scene.second.phrase} {scene.second.color2} "
            f"{scene.second.shape2}"
        )
    first = f"{scene.color1} {scene.shape1}" if scene.names_color1 else scene.shape1
    second = f"{scene.color2} {scene.shape2}" if scene.names_color2 else scene.shape2
    return f"{first} is {phrase or scene.phrase} {second}"
