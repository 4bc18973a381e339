"""Sentences for a scene other than the one that models are trained on.

Source: Wang, Fan, Pan (arXiv 2601.06338), section A.8: fillers, a dropped "is", inverted order, colour synonyms.
"""

from __future__ import annotations

from typing import NamedTuple

from .scene import Scene, caption


class Template(NamedTuple):
    """How a sentence is put together, and which words stand for colours."""

    text: str
    """With {object1}, {phrase} and {object2}; an object is its colour, if the scene names it, and its shape."""
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
"""Name → template. Object 1 is the scene's, whichever the sentence names first."""


def word(scene: Scene, template: str = TRAINED) -> str:
    """The scene's sentence by one of `TEMPLATES`, with the scene's own phrase.

    Raises:
        ValueError: there is no such template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"There is no template {template!r}: choose {', '.join(map(repr, TEMPLATES))}.")
    if template == TRAINED:
        return caption(scene)
    found = TEMPLATES[template]
    colors = {"red": found.red, "blue": found.blue}
    object1 = f"{colors[scene.color1]} {scene.shape1}" if scene.names_color1 else scene.shape1
    object2 = f"{colors[scene.color2]} {scene.shape2}" if scene.names_color2 else scene.shape2
    return found.text.format(object1=object1, phrase=scene.phrase, object2=object2)
