"""Fixtures of the tests here."""

from __future__ import annotations

import pytest
import torch

from hooked_models import HookedTextToImage, Trajectory

from ...hooked_models.pipelines import tiny_pipeline
from .by_hand import PROMPTS, RUN


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5").to(torch.float64))


@pytest.fixture(scope="module")
def run(model) -> Trajectory:
    with torch.no_grad():
        return model.trajectory(PROMPTS, **RUN)


@pytest.fixture(scope="module")
def micro(trained_micro) -> HookedTextToImage:
    return trained_micro
