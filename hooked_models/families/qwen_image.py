"""Qwen-Image: two streams in one attention, [text, image]; texts are padded and masked.

Source: `QwenImageTransformer2DModel` and `QwenDoubleStreamAttnProcessor2_0` (diffusers 0.42); arXiv
2508.02324.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import QwenImageTransformer2DModel

from .adapter import Family
from .blocks import two_streams
from .layout import in_order
from .samples import normal, text_mask, times


def grid(live: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    first = given["img_shapes"][0]
    # reference images come after
    frames, rows, columns = first if isinstance(first[0], int) else first[0]
    return rows, columns, frames


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": normal(transformer, 2, 6, config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, config.joint_attention_dim),
        "encoder_hidden_states_mask": text_mask(transformer),
        "timestep": times(transformer),
        "img_shapes": [[(1, 2, 3)]] * 2,
    } | ({"guidance": 4 * times(transformer)} if config.guidance_embeds else {})


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=12, **size
    )


FAMILY = Family(
    name="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    blocks=(two_streams("transformer_blocks", mlp="img_mlp", text_mlp="txt_mlp"),),
    layout=in_order("text", grid, mask="encoder_hidden_states_mask"),
    inputs=inputs,
    small=small,
)
