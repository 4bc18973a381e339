"""Massive activations are the largest channels of cached streams; a planted one is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_lens.readout import massive_activations

from ...hooked_models.pipelines import PROMPTS
from .test_heat_maps import SEEDS, opened

FAMILIES = ["PixArt", "FLUX.1 true CFG", "SD3", "Lumina 2", "PRX"]


def last_latents(model: Any, n_steps: int, options: dict[str, Any], hooks: Any) -> Tensor:
    with torch.no_grad(), model.hooks(hooks):
        return model.trajectory(PROMPTS, SEEDS, n_steps, **options).latent.flatten(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_massive_channels_are_the_largest_and_are_set_to_zero(name: str) -> None:
    model, n_steps, options = opened(name)
    found = massive_activations(model, PROMPTS, SEEDS, n_steps, k=2, draws=2, **options)
    _, cache = model.run_with_cache(
        PROMPTS,
        SEEDS,
        n_steps,
        names_filter=lambda n: n.startswith("steps.") and n.endswith("hook_resid_post"),
        **options,
    )
    sizes: dict[int, list[Tensor]] = {}
    for full, x in cache.items():
        sizes.setdefault(int(full.split(".")[4]), []).append(x.abs().mean(1))
    for layer, steps in sizes.items():
        mean = torch.stack(steps).mean(0)
        top = mean.topk(2)
        assert torch.equal(
            torch.from_numpy(found["channel_index"].sel(layer=layer).values), top.indices
        )
        ratio = top.values / mean.median(-1, keepdim=True).values
        assert np.allclose(found["ratio"].sel(layer=layer), ratio, rtol=1e-3)

    def zeroed(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        for row, channels in enumerate(found["channel_index"].sel(layer=hook.layer()).values):
            x[row][:, channels] = 0
        return x

    sites = lambda full: ".cond." in full and full.endswith("hook_resid_post")  # noqa: E731
    before, after = (
        last_latents(model, n_steps, options, hooks) for hooks in ([], [(sites, zeroed)])
    )
    assert np.allclose(found["shift"], (after - before).norm(dim=1) / before.norm(dim=1), rtol=1e-3)


def test_a_planted_channel_is_found() -> None:
    model, n_steps, options = opened("SD3")

    def larger(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[..., 7] += 50
        return x

    with model.hooks(
        [(f"steps.{step}.cond.blocks.0.hook_resid_post", larger) for step in range(n_steps)]
    ):
        found = massive_activations(model, PROMPTS, SEEDS, n_steps, k=1, draws=1, **options)
    assert (found["channel_index"] == 7).all()
    assert (found["ratio"] > 5).all()
