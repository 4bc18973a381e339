"""The two-object task (and its extension to three): scenes, images, captions, and a judge of generated images."""

from __future__ import annotations

from .captions import TEMPLATES, from_caption, word
from .judge import evaluate
from .rendering import render
from .sampling import Split, sample
from .scene import (
    COLORS,
    COMBINATIONS,
    DIRECTIONS,
    HELD_OUT,
    OPPOSITE,
    PHRASES,
    RELATIONS,
    SHAPES,
    WORDS,
    Combination,
    Scene,
    Trio,
    caption,
    opposite,
    other_color,
)
from .trios import TRIO_PHRASES, sample_trios

__all__ = [
    "COLORS",
    "COMBINATIONS",
    "DIRECTIONS",
    "HELD_OUT",
    "OPPOSITE",
    "PHRASES",
    "RELATIONS",
    "SHAPES",
    "TEMPLATES",
    "TRIO_PHRASES",
    "WORDS",
    "Combination",
    "Scene",
    "Split",
    "Trio",
    "caption",
    "evaluate",
    "from_caption",
    "opposite",
    "other_color",
    "render",
    "sample",
    "sample_trios",
    "word",
]
