"""Fixtures of the tests here, which run without gradients unless they turn them on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hooked_models import GenerationCache, HookedTextToImage

from ..pipelines import tiny_pipeline
from .watching import is_watched, run


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model(tiny_model: HookedTextToImage) -> Iterator[HookedTextToImage]:
    """Without the hooks of other tests. Its weights are shared: change those of a model of your
    own.
    """
    yield tiny_model
    tiny_model.reset_hooks(including_permanent=True)


@pytest.fixture(scope="session")
def exact() -> HookedTextToImage:
    """With T5, in float64: an attention that is watched sums in another order than the fused one."""
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5", dtype=torch.float64, grid=8))


@pytest.fixture(scope="session")
def whole(exact: HookedTextToImage) -> GenerationCache:
    """The watched tensors of both branches of `exact`, in memory."""
    with torch.no_grad():
        return run(exact, branch="both", names_filter=is_watched)
