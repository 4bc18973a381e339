"""Prompts for a scene other than those of the training set.

Source: Wang, Fan, Pan (arXiv 2601.06338), section A.8: fillers, a dropped "is", inverted order,
color synonyms.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hooked_models.lazy_imports import renamed

from .scene import (
    COLORS,
    DIRECTIONS,
    IMAGE_SIZE,
    PHRASES,
    RADIUS,
    SHAPES,
    Scene,
    caption,
    other_color,
)

__getattr__ = renamed(__name__, {"word": "dit_lens.task.captions:render_caption"})


class Template(NamedTuple):
    """Order of the parts of a prompt, and its color words."""

    text: str
    """Template of {object1}, {phrase}, {object2}; an object is its named color and shape."""
    red: str = "red"
    blue: str = "blue"


TRAINED = "is"
"""The template of the training set."""

TEMPLATES: dict[str, Template] = {
    TRAINED: Template("{object1} is {phrase} {object2}"),
    "no is": Template("{object1} {phrase} {object2}"),
    "no is, the second": Template("{object1} {phrase} the {object2}"),
    "the second": Template("{object1} is {phrase} the {object2}"),
    "the both": Template("the {object1} is {phrase} the {object2}"),
    "inverted": Template("{phrase} {object2} is {object1}"),
    "inverted, the first": Template("{phrase} {object2} is the {object1}"),
    "inverted, the second": Template("{phrase} the {object2} is {object1}"),
    "crimson": Template("{object1} is {phrase} {object2}", red="crimson"),
    "navy": Template("{object1} is {phrase} {object2}", blue="navy"),
}
"""Name → template. Object 1 is the scene's, in either order of the prompt."""


def render_caption(scene: Scene, template: str = TRAINED) -> str:
    """Prompt of a scene in one of `TEMPLATES`, with the scene's own phrase.

    Raises:
        ValueError: there is no such template.

    Example:
        >>> scene = from_caption("red circle is above blue square")
        >>> render_caption(scene, "inverted"), render_caption(scene, "crimson")
        ('above blue square is red circle', 'crimson circle is above blue square')
    """
    if template not in TEMPLATES:
        raise ValueError(
            f"There is no template {template!r}: choose {', '.join(map(repr, TEMPLATES))}."
        )
    if template == TRAINED:
        return caption(scene)
    found = TEMPLATES[template]
    colors = {"red": found.red, "blue": found.blue}
    object1 = f"{colors[scene.color1]} {scene.shape1}" if scene.names_color1 else scene.shape1
    object2 = f"{colors[scene.color2]} {scene.shape2}" if scene.names_color2 else scene.shape2
    return found.text.format(object1=object1, phrase=scene.phrase, object2=object2)


def from_caption(text: str) -> Scene:
    """Scene described by a caption, its objects on either side of the image's centre.

    A color that the caption leaves out is the other object's opposite; object 1 is red if both are
    left out.

    Raises:
        ValueError: the text is no caption of the task.

    Example:
        >>> scene = from_caption("red circle is above blue square")
        >>> scene.shape1, scene.relation, caption(scene)
        ('circle', 'above', 'red circle is above blue square')
    """
    relations = {phrase: relation for relation, phrases in PHRASES.items() for phrase in phrases}
    thing, phrase = rf"(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})", "|".join(relations)
    found = re.fullmatch(rf"{thing} is ({phrase}) {thing}", text)
    if found is None or found[1] == found[4] is not None or found[2] == found[5]:
        raise ValueError(
            f"{text!r} is no caption of the task: write, for example, 'red circle is above blue "
            f"square' (shapes {', '.join(SHAPES)}, two of them; colors {', '.join(COLORS)}, one "
            f"each; {', '.join(relations)})."
        )
    color1 = found[1] or (other_color(found[4]) if found[4] else "red")  # type: ignore[arg-type]
    relation = relations[found[3]]
    half = IMAGE_SIZE // 2
    (x1, y1), (x2, y2) = (
        (half + sign * x * 3 * RADIUS // 2, half + sign * y * 3 * RADIUS // 2)
        for sign, (x, y) in ((1, DIRECTIONS[relation]), (-1, DIRECTIONS[relation]))
    )
    return Scene(
        *(found[2], color1, x1, y1),  # type: ignore[arg-type]
        *(found[5], other_color(color1), x2, y2),  # type: ignore[arg-type]
        *(relation, found[3], found[1] is not None, found[4] is not None),
    )
