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
)

__all__ = [
    "COLORS",
    "COMBINATIONS",
    "DIRECTIONS",
    "HELD_OUT",
    "PHRASES",
    "RELATIONS",
    "SHAPES",
    "WORDS",
    "Combination",
    "Scene",
    "Split",
    "caption",
    "evaluate",
    "other_color",
    "render",
    "sample",
]
