"""LongCat-Image: blocks as in FLUX.1, without a pooled text.

Source: `LongCatImageTransformer2DModel` and `LongCatImageAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import LongCatImageTransformer2DModel

from .adapter import Family
from .blocks import parallel_streams, two_streams
from .layout import ids, in_order
from .samples import packed


def inputs(transformer: Any) -> dict[str, Any]:
    return packed(transformer, 3)


def small() -> Any:
    size = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": [4, 6, 6],
    }
    return LongCatImageTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=12, pooled_projection_dim=12, **size
    )


FAMILY = Family(
    name="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    blocks=(two_streams("transformer_blocks"), parallel_streams("single_transformer_blocks")),
    layout=in_order("text", ids),
    inputs=inputs,
    small=small,
    notes=(
        "single blocks come last; their attn_mlp_out_pre_gate is what attention and MLP write "
        "together"
    ),
)
