"""Fixtures of the tests here."""

from __future__ import annotations

import pytest

from hooked_models import HookedTextToImage

from ..pipelines import tiny_pipeline


@pytest.fixture
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5"))
