"""Sinks and massive activations: found as in cached tensors, their removal as written out, and
planted ones are found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_lens.readout import attention_sinks, massive_activations
from dit_lens.readout.controls import random_others

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


def test_controls_are_other_places_that_are_there() -> None:
    rng = np.random.default_rng(0)
    taken, there = (
        torch.tensor([[0, 3], [1, 2]]),
        torch.tensor([[True] * 6, [False, True, True, True, True, False]]),
    )
    for _ in range(50):
        others = random_others(taken, there, rng)
        assert not set(others[0].tolist()) & {0, 3}
        assert set(others[1].tolist()) == {3, 4}
        assert len(set(others[0].tolist())) == 2
    drawn = torch.stack([random_others(taken, there, rng)[0] for _ in range(400)])
    assert min(drawn.flatten().bincount(minlength=6)[[1, 2, 4, 5]].tolist()) > 150
    with pytest.raises(ValueError, match="take a smaller k"):
        random_others(taken, there[:, :4], rng)
