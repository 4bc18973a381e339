"""HiDream: [image, text] in one attention; each block brings a text of its own along.

Source: `HiDreamImageTransformer2DModel` and `HiDreamAttnProcessor` (diffusers 0.42). Trap: latents
that are not square are padded to `max_resolution`; MLPs are mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel

from .adapter import Family
from .blocks import one_stream, two_streams, weight
from .layout import Layout, ordered, patches
from .samples import normal, times


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    t5, llama = given["encoder_hidden_states_t5"], given["encoder_hidden_states_llama3"]
    rows, columns, _ = grid = patches(live, given)
    text = torch.ones(len(t5), t5.shape[1] + 2 * llama.shape[2], dtype=torch.bool, device=t5.device)
    padding = 0 if rows == columns else live.max_seq - rows * columns
    return ordered(grid, text, "image", references=padding)


def inputs(transformer: Any) -> dict[str, Any]:
    config, side = transformer.config, 2 * transformer.config.patch_size
    return {
        "hidden_states": normal(transformer, 2, config.in_channels, side, side),
        "timesteps": times(transformer, 1000),
        "encoder_hidden_states_t5": normal(transformer, 2, 5, config.caption_channels[0]),
        "encoder_hidden_states_llama3": normal(
            transformer, max(config.llama_layers) + 1, 2, 5, config.caption_channels[1]
        ),
        "pooled_embeds": normal(transformer, 2, config.text_emb_dim),
    }


def small() -> Any:
    size = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "patch_size": 2,
    }
    text = {
        "caption_channels": [12, 8],
        "text_emb_dim": 16,
        "llama_layers": (0, 1),
        "max_resolution": (8, 8),
    }
    more = {"num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2)}
    return HiDreamImageTransformer2DModel(in_channels=4, out_channels=4, **size, **text, **more)


OF_TEXT = {"Q_text": "to_q_t", "K_text": "to_k_t", "V_text": "to_v_t", "O_text": "to_out_t"}
WEIGHTS = {name: weight(f"block.attn1.{path}") for name, path in OF_TEXT.items()}
DOUBLE = two_streams(
    "double_stream_blocks",
    "block.attn1",
    "block.ff_i",
    "block.ff_t",
    ("image", "text"),
    weights=WEIGHTS,
)
FAMILY = Family(
    name="HiDream",
    transformer="HiDreamImageTransformer2DModel",
    blocks=(DOUBLE, one_stream("single_stream_blocks", "block.attn1", mlp_out="block.ff_i")),
    layout=layout,
    inputs=inputs,
    small=small,
    text="encoder_hidden_states_t5",
    no_gradient="diffusers runs its experts without them",
    notes=(
        "text positions are T5's, the last Llama layer's, and those of the block's own Llama layer"
    ),
    alone=(
        "a Llama layer of its own enters each of its blocks: rows are the second axis of that "
        "text, and a prompt's tokens stand at three places of the stream"
    ),
)
