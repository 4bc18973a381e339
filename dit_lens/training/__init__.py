"""Train a text-to-image DiT on scenes: the paper's ε-prediction, or a faster default. `dit-lens train --help`."""

from __future__ import annotations

from .config import TrainConfig
from .loop import train
from .pipelines import PRESETS, build_pipeline, load_pipeline

__all__ = ["PRESETS", "TrainConfig", "build_pipeline", "load_pipeline", "train"]
