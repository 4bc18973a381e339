"""The two-object task: scenes, their images, their captions, and a judge of generated images."""

from __future__ import annotations

from .evaluation import evaluate
from .rendering import render
from .sampling import Split, sample
from .scene import (
    COLORS,
    COMBINATIONS,
    DIRECTIONS,
    HELD_OUT,
    PHRASES,
    RELATIONS,
    SHAPES,
    WORDS,
    Combination,
    Scene,
    caption,
    other_color,
)
from .templates import TEMPLATES, word

__all__ = [
    "COLORS",
    "COMBINATIONS",
    "DIRECTIONS",
    "HELD_OUT",
    "PHRASES",
    "RELATIONS",
    "SHAPES",
    "TEMPLATES",
    "WORDS",
    "Combination",
    "Scene",
    "Split",
    "caption",
    "evaluate",
    "other_color",
    "render",
    "sample",
    "word",
]
