"""Caches of one call keep what names_filter and its options select."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from hooked_models.pixart.dit import HookedDiT

from ..tiny import set_flags


def test_names_filter_selects(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    wanted = {"blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"}
    for names_filter in (list(wanted), tuple(wanted), wanted, wanted.__contains__):
        output, cache = dit.run_with_cache(**inputs, names_filter=names_filter)
        assert isinstance(cache, ActivationCache)
        assert set(cache) == wanted
    assert set(dit.run_with_cache(**inputs, names_filter="hook_embed")[1]) == {"hook_embed"}
    assert torch.equal(output.sample, dit(**inputs).sample)
    assert not any(point.has_hooks() for point in dit.hook_points())


def test_cache_options(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    _, cache = dit.run_with_cache(**one, remove_batch_dim=True)
    assert not cache.has_batch_dim
    assert cache["pattern", 1].shape == (3, 16, 16)
    assert type(dit.run_with_cache(**inputs, return_cache_object=False)[1]) is dict
    with pytest.raises(ValueError, match="exclude each other"):
        set_flags(dit, split=True, attn_in=True)

    class MyCache(ActivationCache):
        pass

    with mock.patch.object(HookedDiT, "cache_class", MyCache):
        assert isinstance(dit.run_with_cache(**inputs)[1], MyCache)
