"""Questions to ask of a hooked text-to-image model. See `hooked_models` for the models."""

from __future__ import annotations

from . import (
    ablation,
    attribution,
    circuits,
    evaluation,
    patching,
    planted,
    prompts,
    remote,
    scenes,
    screening,
    stats,
    steering,
    sweep,
    synopsis,
    variance,
)
from .interventions import Add, Intervention, Replace, Scale

__all__ = [
    "Add",
    "Intervention",
    "Replace",
    "Scale",
    "ablation",
    "attribution",
    "circuits",
    "evaluation",
    "patching",
    "planted",
    "prompts",
    "remote",
    "scenes",
    "screening",
    "stats",
    "steering",
    "sweep",
    "synopsis",
    "variance",
]
