"""Which keys an intervention hides, in each prompt and branch, against patterns and masks by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_lens.intervene.interventions import Intervention
from dit_lens.text.prompts import role_mask

from .by_hand import PROMPTS, RUN, read


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
@pytest.mark.parametrize("site", ["cross_attn", "attn"])
def test_knocked_out_keys_leave_their_attention_to_the_others(model, run, site, branch):
    """The pattern is the old one, restricted to the other keys and divided by its sum."""
    tokens = [0, 3] if site == "attn" else [1, 2]
    intervention = Intervention(
        f"blocks.0.{site}.hook_pattern",
        heads=[1],
        tokens=tokens,
        steps=1,
        branch=branch,
        action="knockout",
    )
    names = [f"steps.1.{b}.blocks.0.{site}.hook_pattern" for b in ("cond", "uncond")]
    ours, plain = (
        read(run, intervention.hooks(model, PROMPTS, num_steps=2), names),
        read(run, [], names),
    )
    for name, b in zip(names, ("cond", "uncond"), strict=True):
        expected = plain[name].clone()
        if branch in (b, "both"):
            expected[:, 1, :, tokens] = 0
            expected[:, 1] /= expected[:, 1].sum(-1, keepdim=True)
            assert (ours[name][:, 1, :, tokens] == 0).all()
        assert torch.equal(ours[name][:, 0], plain[name][:, 0])
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours[name].sum(-1), torch.ones_like(ours[name].sum(-1)))


def test_knocking_a_role_out_everywhere_is_the_models_own_text_mask(model):
    """All heads, layers, steps: the same images as if the tokenizer had called these tokens
    pads.
    """
    hidden = role_mask(model, PROMPTS, "relation")
    intervention = Intervention(
        "blocks.*.cross_attn.hook_pattern", tokens="relation", action="knockout"
    )
    with torch.no_grad():
        ours = model.run_with_hooks(
            PROMPTS, **RUN, fwd_hooks=intervention.hooks(model, PROMPTS, num_steps=2)
        )
        masked = model.trajectory(PROMPTS, **RUN, until=0)
        bias = masked.inputs.text.bias.clone()
        bias[len(PROMPTS) :, 0][hidden] = -10000.0  # rows are [uncond; cond]
        inputs = dataclasses.replace(
            masked.inputs, text=dataclasses.replace(masked.inputs.text, bias=bias)
        )
        oracle = dataclasses.replace(masked, inputs=inputs).fork(0).images
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
        assert (ours - model(PROMPTS, **RUN)).abs().max() > 1e-6
