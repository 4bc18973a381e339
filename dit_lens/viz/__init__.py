"""Figures. Needs the extra `viz` (matplotlib)."""

from __future__ import annotations

from .relation_head import bare, relation_head_figure

__all__ = ["bare", "relation_head_figure"]
