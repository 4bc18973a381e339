"""Images of other sizes are those of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_models import HookedTextToImage
from hooked_models.pipelines.resolution import resize_and_crop

from ..folders import write_folder
from . import PROMPTS
from .opened import diffusers_pipeline


@pytest.mark.parametrize("size", [(200, 330), pytest.param((400, 100), marks=pytest.mark.slow)])
def test_images_of_other_sizes_are_those_of_diffusers(
    size: tuple[int, int], tmp_path: Path
) -> None:
    write_folder(tmp_path / "model", vae_levels=4, sample_size=32, patch_size=8)
    model = HookedTextToImage.from_pretrained(tmp_path / "model")
    height, width = size
    latents = model.noise([1, 2], 2, height=height, width=width)
    assert abs(latents.shape[2] / latents.shape[3] - height / width) < 0.1 * height / width
    ours = resize_and_crop(model(PROMPTS, latents=latents, num_steps=1), height, width)
    call = {
        "use_resolution_binning": True,
        "clean_caption": False,
        "output_type": "pt",
        "num_inference_steps": 1,
    }
    theirs = diffusers_pipeline(tmp_path / "model")(
        list(PROMPTS), latents=latents, height=height, width=width, **call
    ).images
    assert theirs.std() > 0.01
    assert 0 < theirs.min() < theirs.max() < 1  # they clamp after resizing, hook_image before
    assert (ours - theirs).abs().max() < 1e-4


def test_other_sizes_without_a_table(folder: Path) -> None:
    model = HookedTextToImage.from_pretrained(folder, check=False)
    assert model.noise(height=24, width=40, binning=False).shape == (1, 4, 12, 20)
    with pytest.raises(ValueError, match="height=20, width=40: give multiples of 8 pixels"):
        model.noise(height=20, width=40, binning=False)
    with pytest.raises(ValueError, match="sample_size=16 has no table"):
        model.noise(height=20, width=40)
