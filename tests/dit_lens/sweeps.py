"""A small sweep that several test modules run: its model, prompts, metrics and cells."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dit_lens import sweep
from dit_lens.intervene.interventions import Intervention
from hooked_models import HookedTextToImage

from ..hooked_models.pipelines import tiny_pipeline

PROMPTS = [
    "red circle is above blue square",
    "blue square is above circle red",
    "circle is left of red square",
]
SEEDS = [3, 4]
STEPS = 3


def tiny(dtype: torch.dtype = torch.float64) -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5").to(dtype))


def pixels(images: Tensor) -> dict[str, Tensor]:
    """Numbers that say an image apart from others."""
    flat = images.flatten(1)
    return {"first": flat[:, 0], "middle": flat[:, flat.shape[1] // 2], "mean": flat.mean(dim=1)}


METRICS = {"image": sweep.Metric(pixels), "latent": sweep.Metric(pixels, on="latent")}


def durable() -> dict[str, Intervention]:
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), steps=range(STEPS)
    )
    return {
        **cells,
        "mean": Intervention("blocks.0.attn.hook_z", steps=1, action="mean"),
        "untouched": Intervention(
            "blocks.0.cross_attn.hook_pattern",
            tokens=[[True] + [False] * 6] + [[False] * 7] * 2,
            steps=1,
            missing="ignore",
        ),
    }


def shards(folder: Path) -> pd.DataFrame:
    return pd.concat(
        [pd.read_parquet(path) for path in sorted(folder.glob("cells-*.parquet"))],
        ignore_index=True,
    )
