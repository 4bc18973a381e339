"""All prompts that scenes and trios can have."""

from __future__ import annotations

import itertools

from .scene import (
    COLORS,
    COMBINATIONS,
    PHRASES,
    RELATIONS,
    SHAPES,
    Scene,
    Trio,
    caption,
    other_color,
)
from .trios import TRIO_PHRASES


def all_captions() -> list[str]:
    """Every prompt of a scene, 924.

    6 ordered shape pairs × 22 phrases × 7 patterns of color words.

    Example:
        >>> len(all_captions())
        924
    """
    found: dict[str, None] = {}
    for c, named in itertools.product(COMBINATIONS, itertools.product((True, False), repeat=2)):
        for phrase in PHRASES[c.relation]:
            scene = Scene(
                c.shape1,
                c.color1,
                0,
                0,
                c.shape2,
                other_color(c.color1),
                0,
                0,
                c.relation,
                phrase,
                *named,
            )
            found[caption(scene)] = None
    return list(found)


def all_trio_captions() -> list[str]:
    """Every prompt of a trio.

    Orders of the shapes × color patterns × phrases of two different relations.

    Example:
        >>> len(set(all_trio_captions())), all_trio_captions()[0]
        (3984, 'red triangle is above blue circle and below red square')
    """
    found: dict[str, None] = {}
    for shapes, color1, color3 in itertools.product(itertools.permutations(SHAPES), COLORS, COLORS):
        for relations in itertools.permutations(RELATIONS, 2):
            for phrases in itertools.product(*(TRIO_PHRASES[relation] for relation in relations)):
                first, second = (
                    Scene(shapes[0], color1, 0, 0, shape, color, 0, 0, relation, phrase)
                    for shape, color, relation, phrase in zip(
                        shapes[1:], (other_color(color1), color3), relations, phrases, strict=True
                    )
                )
                found[caption(Trio(first, second))] = None
    return list(found)
