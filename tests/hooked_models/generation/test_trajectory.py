"""Runs that are left at a step."""

from __future__ import annotations

import pytest
import torch

from ..pipelines import PROMPTS


@pytest.mark.parametrize("step", [0, 5, 13])
@pytest.mark.parametrize(
    "hook",
    [
        "cond.blocks.1.cross_attn.hook_pattern",
        "hook_x0",
        "hook_out",
        "uncond.blocks.0.hook_mlp_out",
    ],
)
def test_a_fork_with_a_patch_is_the_full_rerun_with_it(model, step, hook):
    def halve(tensor, hook):
        return tensor / 2

    name = f"steps.{step}.{hook}"
    run = model.trajectory(PROMPTS, seed=2)
    fork = run.fork(step, [(name, halve)])
    with model.hooks([(name, halve)]):
        rerun = model.trajectory(PROMPTS, seed=2)
    for ours, full in zip(fork.latents, rerun.latents, strict=True):
        assert torch.equal(ours, full)
    assert not torch.equal(fork.latents[-1], run.latents[-1])
    # forking has left the trajectory as it was
    assert torch.equal(run.fork(step).images, run.images)


def test_a_fork_refuses_hooks_before_it(model):
    run = model.trajectory(PROMPTS)
    with pytest.raises(ValueError, match="steps 5 to 13"):
        run.fork(5, [("steps.4.hook_latent", lambda tensor, hook: None)])
    with pytest.raises(ValueError, match="keeps the text"):
        run.fork(5, [("text_encoder.hook_embed", lambda tensor, hook: None)])
    with pytest.raises(ValueError, match="steps 0 to 13"):
        run.fork(14)


def test_patching_all_cross_attention_from_a_clean_run_gives_the_clean_image(model):
    clean, cache = model.run_with_cache(
        PROMPTS[:1], seed=0, branch="both", names_filter=lambda n: n.endswith("hook_cross_attn_out")
    )
    hooks = [(name, lambda tensor, hook: cache[hook.name]) for name in cache]
    assert torch.equal(model.run_with_hooks(PROMPTS[1:], seed=0, fwd_hooks=hooks), clean)
    assert not torch.equal(model(PROMPTS[1:], seed=0), clean)
