"""`HookedPixArt` against `PixArtSigmaPipeline.__call__`: images, text and branches."""

from __future__ import annotations

import pytest
import torch

from hooked_models import HookedTextToImage

from ..pipelines import CALL, PROMPTS, SCHEDULERS, noise, tiny_pipeline


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    ("text", "learned_sigma", "guidance"),
    [("rte", False, 4.5), ("rte-nopos", False, 1.0), ("t5", True, 4.5), ("t5", False, 4.5)],
)
def test_images_equal_the_pipelines(text, dtype, tolerance, guidance, learned_sigma):
    scheduler = SCHEDULERS["epsilon" if learned_sigma else "flow"]
    pipe = tiny_pipeline(text, learned_sigma, dtype, scheduler)
    reference = pipe(
        list(PROMPTS),
        latents=noise().to(dtype),
        guidance_scale=guidance,
        num_inference_steps=14,
        **CALL,
    ).images
    images = HookedTextToImage.from_pipeline(pipe)(PROMPTS, latents=noise(), guidance=guidance)
    assert reference.std() > 0.05  # not a constant picture
    assert (images - reference).abs().max() < tolerance


def test_stock_pipeline_around_the_hooked_modules_gives_the_same_images(model):
    reference = tiny_pipeline()(
        list(PROMPTS), latents=noise(), num_inference_steps=4, **CALL
    ).images
    pipe = model.as_diffusers()
    pipe.set_progress_bar_config(disable=True)
    assert (
        pipe(list(PROMPTS), latents=noise(), num_inference_steps=4, **CALL).images - reference
    ).abs().max() < 1e-5


def test_non_square_latents(model):
    wide = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    images, cache = model.run_with_cache(
        PROMPTS, latents=wide, num_steps=2, names_filter="blocks.0.cross_attn.hook_pattern"
    )
    assert images.shape == (2, 3, 16, 32)
    assert cache["pattern", 0, "cross_attn", 1].shape[2] == 8


def test_text_keys_are_computed_once_unless_a_hook_asks(model):
    calls = []
    linear = model.dit.blocks[0].cross_attn.to_k
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    try:
        model(PROMPTS, num_steps=5)
        once = len(calls)
        calls.clear()
        model.run_with_hooks(
            PROMPTS,
            num_steps=5,
            fwd_hooks=[("steps.2.cond.hook_caption", lambda tensor, hook: None)],
        )
        with_hook = len(calls)
    finally:
        handle.remove()
    assert (once, with_hook) == (1, 2)


def test_without_guidance_no_second_branch_is_run(model):
    rows = []
    handle = model.dit.proj_out.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    try:
        model(PROMPTS, guidance=1.0, num_steps=2)
    finally:
        handle.remove()
    assert rows == [2, 2]
