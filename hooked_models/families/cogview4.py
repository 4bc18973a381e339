"""CogView4: two streams in one attention, [text, image], with one MLP for both.

Source: `CogView4Transformer2DModel` and `CogView4AttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import CogView4Transformer2DModel

from .adapter import Family
from .blocks import two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    size = normal(transformer, 2, 2).abs() + 8
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.text_embed_dim),
        "timestep": times(transformer, 1000),
        "original_size": size,
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
    grid = {"patch_size": 2, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8)}
    return CogView4Transformer2DModel(
        in_channels=4, out_channels=4, text_embed_dim=12, **size, **grid
    )


FAMILY = Family(
    name="CogView4",
    transformer="CogView4Transformer2DModel",
    blocks=(two_streams("transformer_blocks", "attn1", text_mlp="ff", leaves=("image", "text")),),
    layout=in_order("text", patches, mask="attention_mask"),
    inputs=inputs,
    small=small,
    notes="one MLP serves both streams: mlp_out is its first call, text_mlp_out its second",
)
