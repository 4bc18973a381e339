"""Lumina 2: one stream, each row its own text, then its image, then padding; heads share keys.

Source: `Lumina2Transformer2DModel` and `Lumina2AttnProcessor2_0` (diffusers 0.42). Trap: a row's
image begins where that row's text ends, so positions differ from row to row. Refiners of text and
image run before the blocks that are named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import Lumina2Transformer2DModel

from .adapter import Family
from .blocks import one_stream, width_sizes
from .layout import IMAGE, TEXT, Layout, patches, ragged
from .samples import normal, patch_pixels, text_mask, times


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    rows, columns, frames = grid = patches(live, given)
    mask = given["encoder_attention_mask"].bool()
    return ragged(
        grid, mask, [[(TEXT, n), (IMAGE, rows * columns * frames)] for n in mask.sum(1).tolist()]
    )


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "timestep": times(transformer),
        "encoder_hidden_states": normal(transformer, 2, 5, transformer.config.cap_feat_dim),
        "encoder_attention_mask": text_mask(transformer),
    }


def small() -> Any:
    heads = {
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (64, 32, 32),
    }
    size = {
        "sample_size": 8,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "multiple_of": 8,
        "cap_feat_dim": 12,
    }
    return Lumina2Transformer2DModel(patch_size=2, in_channels=4, **heads, **size)


FAMILY = Family(
    name="Lumina 2",
    transformer="Lumina2Transformer2DModel",
    blocks=(one_stream("layers", attn_out="norm2", mlp_out="ffn_norm2"),),
    layout=layout,
    sizes=width_sizes("num_attention_heads", "hidden_size"),
    inputs=inputs,
    small=small,
    notes=(
        "text positions beyond a row's own text are padding; outputs pass a norm, then a tanh gate"
    ),
)
