"""Questions to ask of a hooked text-to-image model. See `hooked_models` for the models."""

from __future__ import annotations

from . import attribution, circuits, patching, prompts, scenes, screening, stats

__all__ = ["attribution", "circuits", "patching", "prompts", "scenes", "screening", "stats"]
