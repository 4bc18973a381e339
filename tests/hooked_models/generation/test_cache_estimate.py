"""Caches of a whole generation, and estimates of their size."""

from __future__ import annotations

import pytest

from hooked_models import CacheTooLargeError, HookedTextToImage
from hooked_models.generation.cache_estimate import estimate

from ..pipelines import PROMPTS, SCHEDULERS, tiny_pipeline


@pytest.mark.parametrize("text", ["rte", "t5"])
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_the_estimate_is_what_is_used(text, learned_sigma):
    model = HookedTextToImage.from_pipeline(
        tiny_pipeline(text, learned_sigma, scheduler=SCHEDULERS["epsilon"])
    )
    model.dit.set_use_attn_result(True)
    model.dit.set_use_split_qkv_input(True)
    tokens = model.to_tokens(PROMPTS, length=9)
    _, cache = model.run_with_cache(tokens, num_steps=2, branch="both")
    expected = estimate(model, tokens, 2, branch="both")
    assert {name: tensor.nbytes for name, tensor in cache.items()} == expected.sizes
    # the text's keys and values are kept once
    assert cache.nbytes == expected.nbytes < sum(expected.sizes.values())


def test_a_cache_that_is_too_large_is_refused_before_running(model, monkeypatch):
    monkeypatch.setattr(model, "trajectory", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(CacheTooLargeError, match=r"names_filter=.*steps=.*branch="):
        model.run_with_cache(PROMPTS, max_bytes=1000)
    monkeypatch.setattr("hooked_models.generation.cache_estimate.free_bytes", lambda device: 4000)
    with pytest.raises(CacheTooLargeError, match="a quarter of free memory"):
        model.run_with_cache(PROMPTS)
