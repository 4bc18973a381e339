"""Helpers of the tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

SHARDS = {"max_shard_size": "8KB"}


def diffusers_pipeline(folder: Path, **load: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, **{"dtype": torch.float32, **load})
    pipe.set_progress_bar_config(disable=True)
    return pipe
