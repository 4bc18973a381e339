"""Views of a generation at one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_models import HookedTextToImage

from ..pipelines import PROMPTS, tiny_pipeline

STEPS = 2


@pytest.fixture
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5"))


@torch.enable_grad()
def test_views_give_gradients_of_frozen_models(model):
    view, tokens = model.at(1, PROMPTS, num_steps=STEPS, returns="out")
    _, cache = view.run_with_cache(tokens[:1], names_filter="blocks.0.attn.hook_z")
    assert not cache["z", 0].requires_grad
    found: list[Tensor] = []
    with view.hooks([("blocks.0.attn.hook_z", lambda z, hook: found.append(z))]):
        (gradient,) = torch.autograd.grad(view(tokens).sum(), found)
    assert gradient.abs().max() > 0
