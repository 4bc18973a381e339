"""FLUX.1: two streams in one attention, [text, image], then blocks of one stream.

Source: `FluxTransformer2DModel` and `FluxAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import FluxTransformer2DModel

from .adapter import Family
from .blocks import parallel_streams, two_streams
from .layout import ids, in_order
from .samples import normal, packed, times


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    pooled = {"pooled_projections": normal(transformer, 2, config.pooled_projection_dim)}
    guidance = {"guidance": 4 * times(transformer)} if config.guidance_embeds else {}
    return packed(transformer, 3) | pooled | guidance


def small() -> Any:
    sizes = {
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
    }
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 6}
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, guidance_embeds=True, axes_dims_rope=(2, 2, 4), **sizes, **text
    )


FAMILY = Family(
    name="FLUX.1",
    transformer="FluxTransformer2DModel",
    blocks=(two_streams("transformer_blocks"), parallel_streams("single_transformer_blocks")),
    layout=in_order("text", ids),
    inputs=inputs,
    small=small,
    notes=(
        "single blocks come last; their attn_mlp_out_pre_gate is what attention and MLP write "
        "together"
    ),
)
