"""CogView3-Plus: two streams in one attention and one MLP, [text, image].

Source: `CogView3PlusTransformer2DModel` and `CogVideoXAttnProcessor2_0` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import CogView3PlusTransformer2DModel

from .adapter import Family
from .blocks import joint_streams
from .cogview4 import inputs
from .layout import in_order, patches


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    grid = {"patch_size": 2, "pos_embed_max_size": 8, "sample_size": 8}
    return CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, text_embed_dim=12, **size, **grid
    )


FAMILY = Family(
    name="CogView3-Plus",
    transformer="CogView3PlusTransformer2DModel",
    blocks=(joint_streams("transformer_blocks", "attn1"),),
    layout=in_order("text", patches),
    inputs=inputs,
    small=small,
)
