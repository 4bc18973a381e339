"""Caches of a whole generation, and estimates of their size."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import ActivationCache

from ..pipelines import PROMPTS


def test_cache_shorthands(model):
    _, cache = model.run_with_cache(PROMPTS, branch="both", num_steps=5)
    assert isinstance(cache, ActivationCache)
    name = "steps.4.cond.blocks.1.cross_attn.hook_pattern"
    assert torch.equal(cache[name], cache["pattern", 1, "cross_attn", 4])
    assert torch.equal(cache[name], cache["pattern", -1, "cross_attn", 4])
    assert torch.equal(cache[name], cache["steps.4.cond.blocks.1.hook_cross_pattern"])
    assert torch.equal(
        cache["steps.4.uncond.blocks.1.attn.hook_z"], cache["z", 1, "attn", 4, "uncond"]
    )
    assert torch.equal(
        cache["steps.4.cond.blocks.1.hook_resid_mid_cross"], cache["resid_mid2", 1, None, 4]
    )
    assert torch.equal(cache["steps.4.hook_x0"], cache["x0", None, None, 4])
    stacked = cache.stack("pattern", layer=1, sublayer="cross_attn")
    assert stacked.shape == (5, 2, 2, 4, 8)
    assert torch.equal(stacked[4], cache[name])
    at = cache.at(step=4)
    assert torch.equal(at["pattern", 1, "cross_attn"], cache[name])
    assert torch.equal(at["cross_pattern", 1], cache[name])
    assert torch.equal(at["z", 1], cache["steps.4.cond.blocks.1.attn.hook_z"])
    assert torch.equal(at["resid_post", -1], cache["steps.4.cond.blocks.1.hook_resid_post"])
    assert torch.equal(at["scale", 0, "ln1"], cache["steps.4.cond.blocks.0.ln1.hook_scale"])
    with pytest.raises(KeyError, match="which step"):
        cache["pattern", 1, "cross_attn"]


def test_derived_noise_recomposes_the_latent(model):
    _, cache = model.run_with_cache(
        PROMPTS, names_filter=lambda n: n.endswith(("hook_latent", "hook_x0"))
    )
    sigma = model.scheduler.__class__.from_config(model.scheduler.config)
    sigma.set_timesteps(14)
    for step in range(14):
        s = sigma.sigmas[step]
        recomposed = (1 - s) * cache[f"steps.{step}.hook_x0"] + s * cache[f"steps.{step}.eps"]
        assert (recomposed - cache[f"steps.{step}.hook_latent"]).abs().max() < 1e-4


def test_selection_by_step_branch_and_name(model):
    by_name = model.run_with_cache(
        PROMPTS, names_filter=["blocks.0.attn.hook_z", "hook_image"], steps=[1, 3]
    )[1]
    assert set(by_name) == {
        "steps.1.cond.blocks.0.attn.hook_z",
        "steps.3.cond.blocks.0.attn.hook_z",
        "hook_image",
    }
    sliced = model.run_with_cache(
        PROMPTS, names_filter=lambda n: n.endswith("hook_q"), steps=slice(0, 14, 7), branch="uncond"
    )[1]
    assert {name.split(".")[1] for name in sliced} == {"0", "7"}
    assert all(".uncond." in name for name in sliced)
    with pytest.raises(ValueError, match="steps=14: this run has steps 0 to 13"):
        model.run_with_cache(PROMPTS, steps=14)
    with pytest.raises(ValueError, match="Nothing would be cached"):
        model.run_with_cache(PROMPTS, names_filter=lambda n: False)


def test_cached_tensors_are_not_touched_by_later_hooks(model):
    clean = model.run_with_cache(PROMPTS, names_filter="steps.0.hook_latent")[1]

    def zero(tensor, hook):
        tensor[:] = 0

    # attached before the caching hook, but in place on the same tensor
    with model.hooks([("steps.0.hook_latent", zero)]):
        after = model.run_with_cache(PROMPTS, names_filter="steps.0.cond.hook_embed")[1]
    assert clean["steps.0.hook_latent"].abs().max() > 0
    assert len(after) == 1
