"""Rows that enter at different layers get the prediction of a whole forward."""

from __future__ import annotations

import torch

from hooked_models import HookedDiT
from hooked_models.pixart.fast import enter_at_layers

from ...tiny import tiny_inputs, tiny_transformer


def test_rows_enter_where_they_are_told():
    transformer = tiny_transformer().double()
    dit, inputs = HookedDiT(transformer), tiny_inputs(transformer, batch=3, text_len=5)
    sizes, n_layers = inputs["added_cond_kwargs"], dit.cfg.n_layers
    state = dit.encode_text(
        inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    )
    with torch.no_grad():
        output, cache = dit.run_with_cache(text_state=state, **inputs)
        layers = {0: 1, 1: n_layers - 1, 2: n_layers}  # row → where it enters
        residuals = {}
        for row, layer in layers.items():
            x = cache[f"blocks.{layer - 1}.hook_resid_post"][row : row + 1]
            residuals[layer] = torch.cat([residuals[layer], x]) if layer in residuals else x
        latents, t = inputs["hidden_states"], inputs["timestep"]
        found = enter_at_layers.denoise_from(dit, latents[:0], residuals, t, sizes, state)
        assert (found - output.sample).abs().max() < 1e-12
        first = enter_at_layers.denoise_from(
            dit, latents[:1], {1: cache["blocks.0.hook_resid_post"][1:]}, t, sizes, state
        )
        assert (first - output.sample).abs().max() < 1e-12
