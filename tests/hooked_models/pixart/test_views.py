"""Views of single denoiser calls against the denoiser itself."""

from __future__ import annotations

import pytest
import torch

from hooked_models import HookedDiT

from ..tiny import tiny_inputs

Z = "blocks.1.cross_attn.hook_z"


@pytest.fixture
def bound(dit: HookedDiT):
    given = tiny_inputs(dit.wrapped, pads=2)
    latents, text = given["hidden_states"], given["encoder_hidden_states"]
    mask = given["encoder_attention_mask"]
    view, tokens = dit.bind(latents, given["timestep"], text, mask)
    return view, tokens, dit(**given, return_dict=False)[0]


def test_tokens_choose_rows_of_the_table(bound):
    view, tokens, whole = bound
    torch.testing.assert_close(view(tokens), whole)
    torch.testing.assert_close(view(tokens[[1, 0, 1]]), whole[[1, 0, 1]])
    assert torch.equal(view.to_tokens([1]), tokens[[1]])
    with pytest.raises(ValueError, match="no tokens of this view"):
        view(tokens + len(tokens))


def test_hooks_of_a_view_are_the_denoisers(bound):
    view, tokens, whole = bound
    seen: list[torch.Tensor] = []
    out = view.run_with_hooks(tokens, fwd_hooks=[(Z, lambda z, hook: seen.append(z))])
    torch.testing.assert_close(out, whole)
    zero = [(lambda name: name == Z, lambda z, hook: torch.zeros_like(z))]
    with view.dit.hooks(zero):
        expected = view(tokens)
    assert torch.equal(view.run_with_hooks(tokens, fwd_hooks=zero), expected)
    assert not torch.equal(expected, whole)
    assert seen[0].shape[0] == len(tokens)
