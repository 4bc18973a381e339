"""Ideogram 4: one stream, each row padding, its text, then its image.

Source: `Ideogram4Transformer2DModel` and `Ideogram4AttnProcessor` (diffusers 0.42). Latents and
text are both given as long as the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel

from .adapter import Family
from .blocks import one_stream
from .layout import IMAGE, OTHER, TEXT, Layout
from .samples import image_ids, normal, times

IMAGE_SIGN, TEXT_SIGN = 2, 3


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    signs, places = given["indicator"], given["position_ids"]
    labels = (
        torch.full_like(signs, OTHER)
        .masked_fill(signs == IMAGE_SIGN, IMAGE)
        .masked_fill(signs == TEXT_SIGN, TEXT)
    )
    own = places[0][signs[0] == IMAGE_SIGN]
    rows, columns = (int(own[:, axis].max() - own[:, axis].min()) + 1 for axis in (1, 2))
    texts = (signs == TEXT_SIGN).sum(1, keepdim=True)
    mask = torch.arange(signs.shape[1] - len(own), device=signs.device) < texts
    return Layout((rows, columns, 1), mask, {"joint": labels})


def inputs(transformer: Any) -> dict[str, Any]:
    config, device = transformer.config, transformer.device
    signs = torch.tensor([[3] * 5 + [2] * 6, [0] * 2 + [3] * 3 + [2] * 6], device=device)
    places = torch.cat(
        [torch.arange(5, device=device)[:, None].expand(5, 3), image_ids(transformer, 3).long() + 8]
    )
    return {
        "hidden_states": normal(transformer, 2, 11, config.in_channels),
        "timestep": times(transformer),
        "encoder_hidden_states": normal(transformer, 2, 11, config.llm_features_dim),
        "position_ids": places.expand(2, 11, 3),
        "segment_ids": (signs > 0).long(),
        "indicator": signs,
    }


def small() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
    }
    return Ideogram4Transformer2DModel(
        in_channels=4, llm_features_dim=12, mrope_section=(4, 2, 2), **size
    )


FAMILY = Family(
    name="Ideogram 4",
    transformer="Ideogram4Transformer2DModel",
    blocks=(one_stream("layers", "attention", attn_out="attention_norm2", mlp_out="ffn_norm2"),),
    layout=layout,
    inputs=inputs,
    small=small,
    packed_joint=True,
    notes="positions are [image, text, padding]; outputs pass a norm, then a tanh gate",
    alone=(
        "a second transformer computes its unconditional branch, and its text encoder "
        "is run layer by layer, where no hook sees its tokens"
    ),
)
