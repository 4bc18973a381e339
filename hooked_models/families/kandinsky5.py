"""Kandinsky 5 (image and video): an image stream that reads the text by cross-attention.

Source: `Kandinsky5Transformer3DModel` and `Kandinsky5AttnProcessor` (diffusers 0.42). Latents are
[batch frame row column channel]. Blocks of the text alone run before those that are named here.
Every write passes a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel

from .adapter import Family
from .blocks import Attention, Blocks, Write, weight
from .layout import in_order
from .samples import normal, times


def grid(live: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, rows, columns = (
        n // p
        for n, p in zip(given["hidden_states"].shape[1:4], live.config.patch_size, strict=True)
    )
    return rows, columns, frames


def inputs(transformer: Any) -> dict[str, Any]:
    config = transformer.config
    frame, row, column = config.patch_size
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    return {
        "hidden_states": normal(transformer, 2, 2 * frame, 2 * row, 3 * column, channels),
        "encoder_hidden_states": normal(transformer, 2, 5, config.in_text_dim),
        "pooled_projections": normal(transformer, 2, config.in_text_dim2),
        "timestep": times(transformer, 1000),
        "visual_rope_pos": [torch.arange(n, device=transformer.device) for n in (2, 2, 3)],
        "text_rope_pos": torch.arange(5, device=transformer.device),
    }


def small() -> Any:
    size = {
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "time_dim": 16,
    }
    return Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=8, **size
    )


NAMES = {"Q": "to_query", "K": "to_key", "V": "to_value", "O": "out_layer"}
OF = {
    path: {name: weight(f"{path}.{own}") for name, own in NAMES.items()}
    for path in ("self_attention", "cross_attention")
}
ATTENTIONS = {
    "attn": Attention("self_attention", "image", "image", OF["self_attention"]),
    "cross_attn": Attention("cross_attention", "image", "text", OF["cross_attention"]),
}
PARTS = {"attn": "self_attention", "cross_attn": "cross_attention", "mlp": "feed_forward"}
WRITES = {f"{name}_out_pre_gate": Write(path, ("image",)) for name, path in PARTS.items()}


def handed(encoded: Any) -> Any:
    """Text, pooled text and the sums of the rows' lengths, which are all those of the text."""
    text, pooled, sums = encoded
    return text, pooled, torch.arange(len(text) + 1).to(sums) * text.shape[1]


FAMILY = Family(
    name="Kandinsky 5",
    transformer="Kandinsky5Transformer3DModel",
    blocks=(
        Blocks(
            "visual_transformer_blocks", ATTENTIONS, {"visual_embed": "image"}, ("image",), WRITES
        ),
    ),
    layout=in_order("image", grid),
    inputs=inputs,
    small=small,
    sizes=lambda live: (
        live.config.model_dim // sum(live.config.axes_dims),
        sum(live.config.axes_dims),
        live.config.model_dim,
    ),
    axes="fhwc",
    handed=handed,
)
