"""The two-object task (and its extension to three).

Scenes, images, captions, and a judge of generated images.
"""

from __future__ import annotations

from hooked_models.lazy_imports import renamed

from .captions import TEMPLATES, from_caption, render_caption
from .judge import evaluate
from .layout import axis_of, layout
from .paper_rules import paper_verdicts
from .protocol import Task, Trios, TwoObjects
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

__getattr__ = renamed(__name__, {"word": "dit_lens.task.captions:render_caption"})

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
    "Task",
    "Trio",
    "Trios",
    "TwoObjects",
    "axis_of",
    "caption",
    "evaluate",
    "from_caption",
    "layout",
    "opposite",
    "other_color",
    "paper_verdicts",
    "render",
    "render_caption",
    "sample",
    "sample_trios",
]
