"""HunyuanDiT: an image stream that reads two concatenated texts, CLIP's, then T5's.

Source: `HunyuanDiT2DModel` and `HunyuanAttnProcessor2_0` (diffusers 0.42); arXiv 2405.08748. Trap:
T5's text is also pooled into the time embedding, so it reaches every position. Text lengths are
fixed by the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel

from .adapter import Family
from .blocks import cross_attending
from .layout import Layout, mask_of, ordered, patches
from .samples import normal, patch_pixels, times


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    texts = ("encoder_hidden_states", "encoder_hidden_states_t5")
    masks = ("text_embedding_mask", "text_embedding_mask_t5")
    every = [mask_of(given.get(mask), given[text]) for mask, text in zip(masks, texts, strict=True)]
    return ordered(patches(live, given), torch.cat(every, dim=1), "image")


def inputs(transformer: Any) -> dict[str, Any]:
    config, device = transformer.config, transformer.device
    masks = torch.ones(2, config.text_len + config.text_len_t5, device=device)
    masks[1, config.text_len - 2 : config.text_len] = 0
    sizes = {
        "image_meta_size": normal(transformer, 2, 6).abs(),
        "style": torch.zeros(2, dtype=torch.long, device=device),
    }
    angles = normal(transformer, 6, config.attention_head_dim).float()
    return {
        "hidden_states": patch_pixels(transformer, config.in_channels),
        "timestep": times(transformer, 1000),
        "encoder_hidden_states": normal(
            transformer, 2, config.text_len, config.cross_attention_dim
        ),
        "text_embedding_mask": masks[:, : config.text_len],
        "encoder_hidden_states_t5": normal(
            transformer, 2, config.text_len_t5, config.cross_attention_dim_t5
        ),
        "text_embedding_mask_t5": masks[:, config.text_len :],
        "image_rotary_emb": (angles.cos(), angles.sin()),
    } | (sizes if config.use_style_cond_and_image_meta_size else {})


def small() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 4,
        "sample_size": 8,
    }
    text = {
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 6,
        "text_len": 5,
        "text_len_t5": 6,
    }
    return HunyuanDiT2DModel(in_channels=4, patch_size=2, **size, **text)


FAMILY = Family(
    name="HunyuanDiT",
    transformer="HunyuanDiT2DModel",
    blocks=(cross_attending("blocks", gated=()),),
    layout=layout,
    inputs=inputs,
    small=small,
    notes="text positions are CLIP's, then T5's; blocks of the second half first add a long skip",
)
