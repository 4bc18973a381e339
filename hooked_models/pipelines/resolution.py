"""The sizes that a PixArt was trained on: each model has a table of aspect ratios.

Source: `use_resolution_binning` of `PixArtSigmaPipeline.__call__` (diffusers 0.42).
"""

from __future__ import annotations

from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
    ASPECT_RATIO_2048_BIN,
)
from jaxtyping import Float
from torch import Tensor

TABLES = {
    32: ASPECT_RATIO_256_BIN,
    64: ASPECT_RATIO_512_BIN,
    128: ASPECT_RATIO_1024_BIN,
    256: ASPECT_RATIO_2048_BIN,
}
"""By the side of the training latents."""


def nearest_resolution(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """The trained image size (height, width) with the nearest aspect ratio.

    Raises:
        ValueError: a model of this size was trained on squares alone.
    """
    if sample_size not in TABLES:
        raise ValueError(
            f"A model with sample_size={sample_size} has no table of aspect ratios (those of "
            f"{', '.join(map(str, TABLES))} have): binning=False takes the size as it is."
        )
    return PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[sample_size])


def resize_and_crop(
    images: Float[Tensor, "batch 3 _ __"], height: int, width: int
) -> Float[Tensor, "batch 3 {height} {width}"]:
    """Resize images of a trained size to the requested one, as diffusers' pipelines do."""
    return PixArtImageProcessor.resize_and_crop_tensor(images, width, height)
