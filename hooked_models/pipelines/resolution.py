"""The sizes that a PixArt was trained on: each model has a table of aspect ratios.

Source: `use_resolution_binning` of `PixArtSigmaPipeline.__call__` (diffusers 0.42).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

SIDES = {32: 256, 64: 512, 128: 1024, 256: 2048}
"""By the side of the training latents: that of the images."""


def nearest_resolution(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """The trained image size (height, width) with the nearest aspect ratio.

    Raises:
        ValueError: a model of this size was trained on squares alone.
    """
    if sample_size not in SIDES:
        raise ValueError(
            f"A model with sample_size={sample_size} has no table of aspect ratios (those of "
            f"{', '.join(map(str, SIDES))} have): binning=False takes the size as it is."
        )
    table = getattr(_pixart(), f"ASPECT_RATIO_{SIDES[sample_size]}_BIN")
    return _pixart().PixArtImageProcessor.classify_height_width_bin(height, width, table)


def resize_and_crop(
    images: Float[Tensor, "batch 3 _ __"], height: int, width: int
) -> Float[Tensor, "batch 3 {height} {width}"]:
    """Resize images of a trained size to the requested one, as diffusers' pipelines do."""
    return _pixart().PixArtImageProcessor.resize_and_crop_tensor(images, width, height)


def _pixart() -> Any:
    """The module of PixArt-Σ's pipeline in diffusers, imported at the first use: it loads all."""
    return import_module("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
