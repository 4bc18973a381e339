"""Patches and position codes add up; weights are the wrapped module's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    PixArtTransformer2DModel,
)

from hooked_models.pixart.dit import HookedDiT

from ..tiny import tiny_transformer


def test_embedding_and_position_code_add_up(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    _, cache = dit.run_with_cache(**inputs)
    patches = dit.wrapped.pos_embed.proj(inputs["hidden_states"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cache["hook_embed"], patches)
    assert torch.equal(
        cache["hook_embed"] + cache["hook_pos_embed"], cache["blocks.0.hook_resid_pre"]
    )
    assert torch.equal(cache["hook_text"], inputs["encoder_hidden_states"])
    # else each Linear that reads it takes the slow path
    assert cache["blocks.1.hook_resid_post"].is_contiguous()


def test_weights_and_configuration_are_the_wrapped_modules(tmp_path):
    dit = HookedDiT(tiny_transformer())
    dit.save_pretrained(tmp_path)
    saved = PixArtTransformer2DModel.from_pretrained(tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, dit.wrapped.state_dict()[name])
    dit.register_to_config(note="mine")
    assert dit.config["note"] == dit.wrapped.config["note"] == "mine"
