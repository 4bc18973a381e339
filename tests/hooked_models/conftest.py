"""Fixtures of the tests here."""

from __future__ import annotations

from typing import Any

import pytest

from hooked_models.pixart.dit import HookedDiT

from .tiny import set_flags, tiny_inputs, tiny_transformer


@pytest.fixture(scope="module")
def tiny_dit() -> HookedDiT:
    return HookedDiT(tiny_transformer().double())


@pytest.fixture
def inputs(tiny_dit: HookedDiT) -> dict[str, Any]:
    return tiny_inputs(tiny_dit.wrapped, pads=2)


@pytest.fixture
def dit(tiny_dit: HookedDiT) -> HookedDiT:
    """With every flag off. The weights are shared between tests: train a copy."""
    tiny_dit.reset_hooks(including_permanent=True)
    set_flags(tiny_dit)
    return tiny_dit


@pytest.fixture
def full(dit: HookedDiT) -> HookedDiT:
    """With every flag on, so that every hook fires but `attn_in`, which excludes the inputs of q, k
    and v.
    """
    set_flags(dit, result=True, split=True, mlp_in=True)
    return dit
