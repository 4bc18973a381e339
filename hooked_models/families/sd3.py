"""Stable Diffusion 3 and 3.5: both streams in one attention, [image, text].

Source: `SD3Transformer2DModel` and `JointAttnProcessor2_0` (diffusers 0.42); Esser et al. (arXiv
2403.03206).
"""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel

from .adapter import Family
from .blocks import two_streams
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": patch_pixels(transformer, config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, config.joint_attention_dim),
        "pooled_projections": normal(transformer, 2, config.pooled_projection_dim),
        "timestep": times(transformer, 1000),
    }


def small() -> Any:
    sizes = {
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "sample_size": 8,
        "pos_embed_max_size": 8,
    }
    text = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6}
    return SD3Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **sizes,
        **text,
    )


FAMILY = Family(
    name="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    blocks=(two_streams("transformer_blocks", image_attn="attn2"),),
    layout=in_order("image", patches),
    inputs=inputs,
    small=small,
    notes=(
        "image_attn is the second, image-only attention that some blocks of 3.5 have; the last "
        "block returns no text"
    ),
)
