"""FLUX.1: two streams in one attention, [text, image], then blocks of one stream; rotary position codes.

Source: `FluxTransformer2DModel` and `FluxAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from .adapter import Family, random


def inputs(transformer: Any) -> dict[str, Any]:
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    places = torch.zeros(6, 3, device=device)
    places[:, 1], places[:, 2] = torch.arange(6, device=device) // 3, torch.arange(6, device=device) % 3
    guidance = {"guidance": torch.tensor([3.5, 3.5], device=device, dtype=dtype)} if config.guidance_embeds else {}
    return {
        "hidden_states": random(2, 6, config.in_channels).to(device, dtype),
        "encoder_hidden_states": random(2, 5, config.joint_attention_dim).to(device, dtype),
        "pooled_projections": random(2, config.pooled_projection_dim).to(device, dtype),
        "timestep": torch.tensor([0.9, 0.2], device=device, dtype=dtype),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3, device=device),
    } | guidance


def small() -> Any:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


FAMILY = Family(
    name="FLUX.1",
    transformer="FluxTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attentions={"attn": "attn"},
    text="before",
    inputs=inputs,
    small=small,
    notes="q and k are seen after their norm and rotation; layers count the two-stream blocks first",
)
