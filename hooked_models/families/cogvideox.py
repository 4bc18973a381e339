"""CogVideoX: two streams in one attention, [text, image], with one MLP over both at once.

Source: `CogVideoXTransformer3DModel` and `CogVideoXAttnProcessor2_0` (diffusers 0.42). Latents are
[batch frame channel row column].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from .adapter import Family
from .blocks import joint_streams
from .layout import in_order
from .samples import normal, times


def grid(live: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, _, height, width = given["hidden_states"].shape[1:]
    return (
        height // live.config.patch_size,
        width // live.config.patch_size,
        frames // (live.config.patch_size_t or 1),
    )


def inputs(transformer: Any) -> dict[str, Any]:
    config, p = transformer.config, transformer.config.patch_size
    frames = (
        config.patch_size_t or (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    )
    n_text = config.max_text_seq_length
    size = (
        (config.sample_height, config.sample_width)
        if config.use_learned_positional_embeddings
        else (2 * p, 3 * p)
    )
    return {
        "hidden_states": normal(transformer, 2, frames, config.in_channels, *size),
        "encoder_hidden_states": normal(transformer, 2, n_text, config.text_embed_dim),
        "timestep": times(transformer, 1000),
    } | (
        {"ofs": torch.ones(2, device=transformer.device, dtype=transformer.dtype)}
        if config.ofs_embed_dim
        else {}
    )


def small() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "sample_width": 6,
        "sample_height": 4,
    }
    text = {"time_embed_dim": 4, "text_embed_dim": 12, "max_text_seq_length": 5, "sample_frames": 9}
    return CogVideoXTransformer3DModel(in_channels=4, out_channels=4, patch_size=2, **size, **text)


FAMILY = Family(
    name="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    blocks=(joint_streams("transformer_blocks", "attn1"),),
    layout=in_order("text", grid),
    inputs=inputs,
    small=small,
    axes="fchw",
)
