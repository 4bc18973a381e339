"""LTX-Video: packed positions are frames of rows of columns; the text is read by cross-attention.

Source: `LTXVideoTransformer3DModel` and `LTXVideoAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from typing import Any

from diffusers import LTXVideoTransformer3DModel

from .adapter import Family
from .blocks import cross_attending
from .circuits import OWN_NORMS
from .layout import in_order
from .samples import normal, text_mask, times


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": normal(transformer, 2, 12, transformer.config.in_channels),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.caption_channels),
        "timestep": times(transformer, 1000),
        "encoder_attention_mask": text_mask(transformer),
        "num_frames": 2,
        "height": 2,
        "width": 3,
    }


def small() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
    }
    return LTXVideoTransformer3DModel(in_channels=8, out_channels=8, caption_channels=12, **size)


FAMILY = Family(
    name="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    blocks=(cross_attending("transformer_blocks"),),
    layout=in_order(
        "image",
        lambda live, given: (given["height"], given["width"], given["num_frames"]),
        mask="encoder_attention_mask",
    ),
    inputs=inputs,
    small=small,
    nonlinear=lambda live: OWN_NORMS,
)
