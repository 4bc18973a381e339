"""Images from a text encoder's layers equal those of a pipeline whose encoder is cut off there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_lens.readout import diffusion_lens
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import CALL, PROMPTS
from ...hooked_models.pipelines import tiny_pipeline as tiny_pixart
from ...hooked_models.tiny_pipelines import tiny_pipeline

SEEDS = [3, 4]
LISTS = {
    "PixArt": ("text_encoder", "encoder.block"),
    "FLUX.1": ("text_encoder_2", "encoder.block"),
    "SD3": ("text_encoder_3", "encoder.block"),
    "SANA": ("text_encoder", "layers"),
    "Qwen-Image": ("text_encoder", "model.language_model.layers"),
}
"""Pipeline → the text encoder that is cut by default, and its list of layers."""


@pytest.mark.parametrize("name", LISTS)
def test_a_layer_is_an_encoder_that_ends_there(name: str) -> None:
    if name == "PixArt":
        pipe, call, options = tiny_pixart("t5"), {**CALL, "guidance_scale": 4.5}, {}
    else:
        pipe, call = tiny_pipeline(name)
        options = {
            key: value
            for key, value in call.items()
            if key not in ("num_inference_steps", "output_type")
        }
    model = HookedTextToImage.from_pipeline(pipe)
    found = diffusion_lens(model, PROMPTS, None, SEEDS, 3, **options)
    assert found["layer"].values.tolist() == [0, 1]
    own = model(PROMPTS, SEEDS, 3, **options)
    assert torch.equal(torch.from_numpy(found.sel(layer=1).values), own)
    assert torch.equal(model(PROMPTS, SEEDS, 3, **options), own)

    component, path = LISTS[name]
    cut = copy.deepcopy(getattr(pipe, component))
    owner, _, attribute = path.rpartition(".")
    setattr(cut.get_submodule(owner), attribute, nn.ModuleList(cut.get_submodule(path)[:1]))
    for config in (cut.config, getattr(cut.config, "text_config", cut.config)):
        config.num_hidden_layers = 1
    setattr(pipe, component, cut)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    arguments: dict[str, Any] = {**call, "num_inference_steps": 3, "output_type": "pt"}
    with torch.no_grad():
        theirs: Tensor = pipe(prompt=list(PROMPTS), generator=generators, **arguments).images
    ours = torch.from_numpy(found.sel(layer=0).values)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, own, atol=1e-4)


def test_an_encoder_is_chosen_by_name_and_senseless_ones_are_refused() -> None:
    pipe, call = tiny_pipeline("SD3")
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    model = HookedTextToImage.from_pipeline(pipe)
    t5, clip = (
        diffusion_lens(model, PROMPTS[0], 0, 3, 2, encoder=name, **options)
        for name in (None, "text_encoder")
    )
    assert abs(t5 - clip).max() > 1e-4
    with pytest.raises(ValueError, match="has text_encoder, text_encoder_2, text_encoder_3"):
        diffusion_lens(model, PROMPTS[0], 0, encoder="t5", **options)
    with pytest.raises(ValueError, match="There is no layer 2"):
        diffusion_lens(model, PROMPTS[0], 2, **options)
    with pytest.raises(ValueError, match="has no layers"):
        diffusion_lens(HookedTextToImage.from_pipeline(tiny_pixart("rte")), PROMPTS[0])
