"""Tiny float64 models in which every parameter is random, seen through each of the views."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_models import HookedDiT, HookedTextToImage
from hooked_models.pixart.dit import FoldedDiT

from ..hooked_models.pipelines import tiny_pipeline
from ..hooked_models.tiny import tiny_transformer
from .family_cases import FIRST, OTHERS, Case, case_of
from .oracles import TESTS, TIMESTEP, Bound, bind


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[TESTS] = [item for item in items if item.path.parent == Path(__file__).parent]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """TransformerLens allocates results in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def dit() -> HookedDiT:
    return HookedDiT(tiny_transformer(num_attention_heads=2, sample_size=4).double()).eval()


@pytest.fixture(scope="session")
def folded_dit(dit: HookedDiT) -> FoldedDiT:
    return dit.fold_timestep(TIMESTEP)


@pytest.fixture(scope="session")
def bound(dit: HookedDiT) -> Bound:
    """`dit.bind`, image positions."""
    return bind(dit)


@pytest.fixture(scope="session")
def text_bound(dit: HookedDiT) -> Bound:
    """`dit.bind(pos="text")`."""
    return bind(dit, pos="text")


@pytest.fixture(scope="session")
def folded(folded_dit: FoldedDiT) -> Bound:
    """`dit.fold_timestep(t).bind(returns="patches")`."""
    return bind(folded_dit, returns="patches")


@pytest.fixture(scope="session")
def generation() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))


@pytest.fixture(params=[*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def case(request: Any) -> Iterator[Case]:
    """The tiny pipelines, one after the other; all but a few are slow."""
    with torch.no_grad():
        yield case_of(request.param)
