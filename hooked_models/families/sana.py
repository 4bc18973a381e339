"""SANA: linear attention within the image, softmax attention to the text.

Source: `SanaTransformer2DModel`, `SanaLinearAttnProcessor2_0` and `SanaAttnProcessor2_0` (diffusers 0.42); arXiv 2410.10629.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel

from .adapter import Family, random


def inputs(transformer: Any) -> dict[str, Any]:
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    side = 3 * config.patch_size
    return {
        "hidden_states": random(2, config.in_channels, side, side).to(device, dtype),
        "encoder_hidden_states": random(2, 5, config.caption_channels).to(device, dtype),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device),
        "timestep": torch.tensor([901, 17], device=device),
    }


def small() -> Any:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=3,
        patch_size=1,
    )


FAMILY = Family(
    name="SANA",
    transformer="SanaTransformer2DModel",
    blocks=("transformer_blocks",),
    attentions={"cross_attn": "attn2"},
    text="cross",
    inputs=inputs,
    small=small,
    no_pattern={"attn": "SANA's attention within the image is linear (ReLU kernels, no softmax), so there is no pattern to see."},
    notes="modulation is PixArt's adaLN-single; the MLP is a gated convolution",
)
