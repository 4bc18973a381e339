"""Sinks and massive activations: found as in cached tensors, their removal as written out, and
planted ones are found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_lens.readout import attention_sinks

from ...hooked_models.pipelines import PROMPTS
from .test_heat_maps import SEEDS, opened

FAMILIES = ["PixArt", "FLUX.1 true CFG", "SD3", "Lumina 2", "PRX"]


def last_latents(model: Any, n_steps: int, options: dict[str, Any], hooks: Any) -> Tensor:
    with torch.no_grad(), model.hooks(hooks):
        return model.trajectory(PROMPTS, SEEDS, n_steps, **options).latent.flatten(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_sinks_are_the_keys_with_most_attention_and_masking_them_is_renormalising(
    name: str,
) -> None:
    model, n_steps, options = opened(name)
    found = attention_sinks(model, PROMPTS, SEEDS, n_steps, k=2, draws=1, **options)
    chosen = lambda full: full.startswith("steps.") and full.endswith(".attn.hook_pattern")  # noqa: E731
    _, cache = model.run_with_cache(PROMPTS, SEEDS, n_steps, names_filter=chosen, **options)
    for full, pattern in cache.items():
        _, step, _, _, layer, *_ = full.split(".")
        ours = found["received"].sel(layer=int(layer))[:, int(step)].values
        assert abs(ours - pattern.mean((1, 2)).numpy()).max() < 1e-5
    assert abs(found["received"].sum("key_pos") - 1).max() < 1e-5
    assert (found["share"] == found["received"].isel(key_pos=found["sink"]).sum("rank")).all()

    def masked(pattern: Tensor, hook: Any) -> Tensor:
        step, layer = hook.step, hook.layer()
        new = pattern.clone()
        for row, keys in enumerate(found["sink"].sel(layer=layer)[:, step].values):
            new[row, :, :, keys] = 0
        return new / new.sum(-1, keepdim=True)

    sites = lambda full: chosen(full) and ".cond." in full  # noqa: E731
    before, after = (
        last_latents(model, n_steps, options, hooks) for hooks in ([], [(sites, masked)])
    )
    shift = (after - before).norm(dim=1) / before.norm(dim=1)
    assert np.allclose(found["shift"], shift, rtol=1e-2)
    assert found["control_shift"].shape == (1, 2)
    assert (found["control_shift"] > 0).all()


def test_a_planted_sink_is_found_and_matters_more_than_random_keys() -> None:
    model, n_steps, options = opened("FLUX.1 true CFG")

    def drawn(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[..., 5] += 3
        return scores

    with model.hooks([(lambda name: name.endswith("hook_attn_scores"), drawn)]):
        found = attention_sinks(model, PROMPTS, SEEDS, n_steps, draws=4, **options)
    assert (found["sink"] == 5).all()
    assert (found["shift"] > found["control_shift"].max("draw")).all()
