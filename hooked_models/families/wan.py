"""Wan 2.1 and 2.2 (text to video): an image stream that reads the text by cross-attention.

Source: `WanTransformer3DModel` and `WanAttnProcessor` (diffusers 0.42). Models that also read an
image call the kernel of `cross_attn` twice, which is refused. Positions are frames of rows of
columns.
"""

from __future__ import annotations

from typing import Any

from diffusers import WanTransformer3DModel

from .adapter import Family
from .blocks import cross_attending
from .layout import in_order, patches
from .samples import normal, patch_pixels, times


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(
            transformer, transformer.config.in_channels, frames=2 * transformer.config.patch_size[0]
        ),
        "timestep": times(transformer, 1000),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.text_dim),
    }


def small() -> Any:
    size = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    text = {"text_dim": 16, "freq_dim": 64, "ffn_dim": 32, "cross_attn_norm": True}
    return WanTransformer3DModel(in_channels=4, out_channels=4, **size, **text)


FAMILY = Family(
    name="Wan",
    transformer="WanTransformer3DModel",
    blocks=(cross_attending("blocks", mlp="ffn"),),
    layout=in_order("image", patches),
    inputs=inputs,
    small=small,
)
