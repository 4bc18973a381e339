"""Fixtures of the tests here."""

from __future__ import annotations

import pytest
import torch

from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline
from .groups import PROMPTS, RUN


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5", grid=8).to(torch.float64))


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(
            PROMPTS, **RUN, names_filter=lambda name: name.endswith("hook_pattern"), branch="both"
        )[1]
