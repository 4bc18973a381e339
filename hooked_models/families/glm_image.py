"""GLM-Image: two streams in one attention, [text, image], with one MLP for both.

Source: `GlmImageTransformer2DModel` and `GlmImageAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import GlmImageTransformer2DModel

from .adapter import Family
from .blocks import two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    size = normal(transformer, 2, 2).abs() + 8
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.text_embed_dim),
        "prior_token_id": torch.arange(12, device=transformer.device).reshape(2, 6),
        "prior_token_drop": torch.zeros(2, dtype=torch.bool, device=transformer.device),
        "timestep": times(transformer, 1000),
        "target_size": size,
        "crop_coords": 0 * size,
    }


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=12,
        prior_vq_quantizer_codebook_size=16,
        **size,
    )


FAMILY = Family(
    name="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    blocks=(two_streams("transformer_blocks", "attn1", text_mlp="ff", leaves=("image", "text")),),
    layout=in_order("text", patches, mask="attention_mask"),
    inputs=inputs,
    small=small,
    notes="one MLP serves both streams: mlp_out is its first call, text_mlp_out its second",
    alone=(
        "a language model draws its image tokens before the loop, and "
        "the text that enters it is that in quotation marks alone"
    ),
)
