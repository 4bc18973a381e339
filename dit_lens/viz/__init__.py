"""Figures. Needs the extra `viz` (matplotlib)."""

from __future__ import annotations

from .relation_head import relation_head_figure

__all__ = ["relation_head_figure"]
