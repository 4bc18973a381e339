"""Krea 2: one stream, [text, image], with gated attention; heads share keys.

Source: `Krea2Transformer2DModel` and `Krea2AttnProcessor` (diffusers 0.42). Trap: a gate of its own
stands between z and W_O. Layers of the text encoder are fused before the blocks that are named
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel

from .adapter import Family
from .blocks import one_stream
from .layout import extent, in_order
from .samples import image_ids, normal, text_mask, times


def grid(live: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    return extent(given["position_ids"][given["encoder_hidden_states"].shape[1] :])


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": normal(transformer, 2, 6, config.in_channels),
        "encoder_hidden_states": normal(
            transformer, 2, 5, config.num_text_layers, config.text_hidden_dim
        ),
        "timestep": times(transformer),
        "position_ids": torch.cat(
            [torch.zeros(5, 3, device=transformer.device), image_ids(transformer, 3)]
        ),
        "encoder_attention_mask": text_mask(transformer),
    }


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    }
    text = {
        "text_hidden_dim": 8,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
    }
    refiner = {
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
    }
    return Krea2Transformer2DModel(
        in_channels=4, timestep_embed_dim=16, axes_dims_rope=(4, 6, 6), **size, **text, **refiner
    )


FAMILY = Family(
    name="Krea 2",
    transformer="Krea2Transformer2DModel",
    blocks=(one_stream("transformer_blocks"),),
    layout=in_order("text", grid, mask="encoder_attention_mask"),
    inputs=inputs,
    small=small,
    notes="what a head writes is W_O of z times a gate of the position's own",
)
