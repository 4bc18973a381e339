"""Runs in copies against the run itself."""

from __future__ import annotations

import pytest
import torch

from dit_lens.graph.nodes import Place
from dit_lens.runs.repeated_runs import OUTPUT, RepeatedCall, RepeatedRun
from hooked_models.generation.names import IMAGE_HOOK

PROMPTS = ["red circle is above blue square", "blue square is left of red circle"]
Z = "blocks.0.cross_attn.hook_z"


@torch.no_grad()
def test_copies_of_a_generation_are_the_generation(trained_nano):
    run = trained_nano.trajectory(PROMPTS, seed=[0, 1], num_steps=2)
    repeated = RepeatedRun(run)
    name = repeated.name(Place(1, "cond"), Z)
    assert (len(repeated), repeated.num_steps, repeated.branches[0]) == (2, 2, "cond")
    assert (repeated.step_of(name), repeated.step_of(IMAGE_HOOK)) == (1, 1)
    assert repeated.texts == PROMPTS
    found = repeated.run([name, IMAGE_HOOK], copies=2, first=0)
    torch.testing.assert_close(found[IMAGE_HOOK], run.images.repeat(2, 1, 1, 1))
    _, cache = trained_nano.run_with_cache(PROMPTS, [0, 1], 2, names_filter=[name])
    torch.testing.assert_close(found[name], cache[name].repeat(2, 1, 1, 1))
    zero = [(name, lambda z, hook: z * torch.tensor([1.0, 1, 0, 0])[:, None, None, None])]
    edited = repeated.run([IMAGE_HOOK], zero, copies=2, first=0)[IMAGE_HOOK]
    torch.testing.assert_close(edited[:2], run.images)
    assert not torch.equal(edited[2:], run.images)


@torch.no_grad()
def test_copies_of_a_call_are_the_call(trained_nano):
    dit = trained_nano.dit
    generator = torch.Generator().manual_seed(0)
    sample = dit.wrapped.config.sample_size
    latents = torch.randn(2, dit.wrapped.config.in_channels, sample, sample, generator=generator)
    text = torch.randn(2, 4, dit.wrapped.config.caption_channels, generator=generator)
    view, tokens = dit.bind(latents, torch.tensor([500.0, 500.0]), text, torch.ones(2, 4))
    repeated = RepeatedCall(view)
    found = repeated.run([OUTPUT, Z], copies=3)
    torch.testing.assert_close(found[OUTPUT], view(tokens).repeat(3, 1, 1, 1))
    assert len(found[Z]) == 6
    assert repeated.tokens([1, 3], 4).tolist() == [[False, True, False, True]] * 2
    assert (repeated.text_bias("cond") == 0).all()
    with pytest.raises(ValueError, match="does not know its words"):
        repeated.roles()
