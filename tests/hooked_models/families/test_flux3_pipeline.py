"""FLUX.3's modular pipeline as it is called here, against its own call."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hooked_models import HookedTextToImage
from hooked_models.families.flux3_pipeline import Flux3Pipeline

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline

OWN = {
    "height": 16,
    "width": 16,
    "max_sequence_length": 48,
    "text_encoder_out_layers": (1, 2),
}


@pytest.fixture(scope="module")
def modular() -> Any:
    return tiny_pipeline("FLUX.3")[0].modular


@pytest.fixture(scope="module")
def model(modular: Any) -> Any:
    found = HookedTextToImage.from_pipeline(modular)
    found.options = OWN
    return found


def own_call(modular: Any, prompt: str, seed: int, **how: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    given = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", **OWN, **how}
    return modular(prompt=prompt, output="images", **given)


def test_images_are_bitwise_the_modular_pipelines(modular: Any, model: Any) -> None:
    """Its own call draws one prompt; a batch has each prompt's image."""
    guider = modular.guider
    alone = []
    for prompt, seed in zip(PROMPTS, (3, 4), strict=True):
        alone.append(own_call(modular, prompt, seed))
        assert torch.equal(model(prompt, seed, 2), alone[-1])
    batch = model(PROMPTS, [3, 4], 2)
    assert torch.allclose(batch, torch.cat(alone), atol=1e-5)
    negative = own_call(modular, PROMPTS[0], 3, negative_prompt="blue square")
    assert torch.equal(model(PROMPTS[0], 3, 2, negative_prompt="blue square"), negative)
    assert not torch.equal(negative, alone[0])
    assert modular.guider is guider
    assert guider.guidance_scale == 3.5
    assert model.as_diffusers() is modular
    plain = Flux3Pipeline(modular)
    generator = torch.Generator().manual_seed(3)
    how = {"num_inference_steps": 2, "output_type": "pt", **OWN}
    assert torch.equal(plain(PROMPTS[0], generator=generator, **how).images, alone[0])


def test_guidance_is_the_guiders(modular: Any, model: Any) -> None:
    stronger = modular.guider.new(guidance_scale=6.0)
    before = modular.guider
    modular.update_components(guider=stronger)
    found = own_call(modular, PROMPTS[0], 3)
    modular.update_components(guider=before)
    assert torch.equal(model(PROMPTS[0], 3, 2, 6.0), found)
    one_branch = model.draft(PROMPTS[0], 3, 2, 1.0)
    assert not one_branch.guided
    assert model.draft(PROMPTS[0], 3, 2, 6.0).guided


def test_prompts_of_other_windows_are_refused_and_stops_are_no_errors(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model.pipe.blocks["text_encoder"]._block.pad_multiple = 8
    with pytest.raises(ValueError, match="give prompts of similar length"):
        model.draft(["red circle", "red circle is above blue square"], num_steps=1)
    model.pipe.blocks["text_encoder"]._block.pad_multiple = 48
    with caplog.at_level(logging.ERROR, logger="diffusers"):
        model.trajectory(PROMPTS, [3, 4], 2).fork(1)
    assert not caplog.records
