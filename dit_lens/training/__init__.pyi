from .config import TrainConfig
from .loop import train
from .pipelines import PRESETS, build_pipeline, load_pipeline

__all__ = ["PRESETS", "TrainConfig", "build_pipeline", "load_pipeline", "train"]
