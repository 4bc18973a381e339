"""HunyuanVideo: two streams in one attention, [image, text], then blocks of one stream.

Source: `HunyuanVideoTransformer3DModel` and `HunyuanVideoAttnProcessor2_0` (diffusers 0.42). Trap:
the text is refined, and modulated by its own mean, before the blocks that are named here.
"""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanVideoTransformer3DModel

from .adapter import Family
from .blocks import parallel_streams, two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, text_mask, times


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": patch_pixels(
            transformer, config.in_channels, frames=2 * config.patch_size_t
        ),
        "timestep": times(transformer, 1000),
        "encoder_hidden_states": normal(transformer, 2, 5, config.text_embed_dim),
        "encoder_attention_mask": text_mask(transformer).long(),
        "pooled_projections": normal(transformer, 2, config.pooled_projection_dim),
    } | ({"guidance": times(transformer, 4000)} if config.guidance_embeds else {})


def small() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
    }
    text = {
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 12,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, **size, **text)


LEAVES = ("image", "text")
FAMILY = Family(
    name="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    blocks=(
        two_streams("transformer_blocks", leaves=LEAVES),
        parallel_streams("single_transformer_blocks", leaves=LEAVES),
    ),
    layout=in_order("image", patches, mask="encoder_attention_mask"),
    inputs=inputs,
    small=small,
    spreads=frozenset({"text"}),
    notes=(
        "single blocks come last; their attn_mlp_out_pre_gate is what attention and MLP write "
        "together"
    ),
)
