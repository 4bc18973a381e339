"""Figures and an interactive page. Needs the extra `viz` (matplotlib)."""

from __future__ import annotations

from . import style
from .attention_page import Effects, attention_page, show
from .figures import (
    bare,
    dose_response_curves,
    head_step_map,
    intervals,
    learning_curves,
    name_rows,
    ramp_gallery,
    variance_bars,
    word_maps,
)
from .relation_head import relation_head_figure
from .report import report

__all__ = [
    "Effects",
    "attention_page",
    "bare",
    "dose_response_curves",
    "head_step_map",
    "intervals",
    "learning_curves",
    "name_rows",
    "ramp_gallery",
    "relation_head_figure",
    "report",
    "show",
    "style",
    "variance_bars",
    "word_maps",
]
