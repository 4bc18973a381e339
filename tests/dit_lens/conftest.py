"""Fixtures of the tests here."""

from __future__ import annotations

import pytest
import torch

from dit_lens import attribution
from hooked_models import HookedDiT, HookedTextToImage

from ..hooked_models.pipelines import tiny_pipeline
from ..hooked_models.tiny import tiny_transformer
from .pairs import generations, views


@pytest.fixture(scope="module")
def dit() -> HookedDiT:
    return HookedDiT(tiny_transformer().double())


@pytest.fixture(scope="module")
def calls(dit: HookedDiT) -> attribution.Pair:
    return attribution.pair(*views(dit, latents=True))


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    model = HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))
    # away from the clamp to [0, 1], where nothing is smooth
    model.codec.register_to_config(scaling_factor=4.0)
    return model


@pytest.fixture(scope="module")
def images(model: HookedTextToImage) -> attribution.Pair:
    return attribution.pair(*generations(model))
