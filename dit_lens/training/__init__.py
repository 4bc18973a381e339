"""Train a text-to-image DiT on scenes: the paper's ε-prediction, or a faster default.

`dit-lens train --help` lists the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_models.lazy_imports import attach

if TYPE_CHECKING:
    from .config import TrainConfig
    from .history import finished
    from .loop import train
    from .pipelines import PRESETS, build_pipeline, load_pipeline

__all__ = ["PRESETS", "TrainConfig", "build_pipeline", "finished", "load_pipeline", "train"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "TrainConfig": "config:TrainConfig",
        "finished": "history:finished",
        "train": "loop:train",
        "PRESETS": "pipelines:PRESETS",
        "build_pipeline": "pipelines:build_pipeline",
        "load_pipeline": "pipelines:load_pipeline",
    },
)
