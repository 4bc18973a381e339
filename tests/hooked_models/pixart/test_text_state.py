"""A text state is what the hooks see, computed once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hooked_models.pixart.dit import HookedDiT, TextState

from ..tiny import look, with_state


def test_a_text_state_is_what_the_hooks_see(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    state = with_state(dit, inputs)["text_state"]
    assert isinstance(state, TextState)
    _, cache = dit.run_with_cache(**inputs)
    torch.testing.assert_close(state.caption, cache["hook_caption"])
    for layer, (k, v) in enumerate(state.keys_values):
        torch.testing.assert_close(k, cache[f"blocks.{layer}.cross_attn.hook_k"])
        torch.testing.assert_close(v, cache[f"blocks.{layer}.cross_attn.hook_v"])


def test_a_text_state_saves_the_text_projections(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    dit = copy.deepcopy(dit)
    reused = with_state(dit, inputs)
    calls: list[nn.Module] = []
    for module in (dit.wrapped.caption_projection, dit.wrapped.transformer_blocks[1].attn2.to_k):
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    dit(**reused)
    assert not calls
    dit.run_with_hooks(**reused, fwd_hooks=[("blocks.0.cross_attn.hook_k", look)])
    assert not calls
    dit.run_with_hooks(**reused, fwd_hooks=[("hook_caption", look)])
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["hook_text", "hook_caption", "blocks.1.cross_attn.hook_v_input"])
def test_text_hooks_are_noticed(name: str, full: HookedDiT) -> None:
    assert not full.text_hooks_active
    with full.hooks([(name, look)]):
        assert full.text_hooks_active
    with full.hooks([("blocks.1.cross_attn.hook_q_input", look), ("blocks.0.hook_cross_k", look)]):
        assert not full.text_hooks_active
