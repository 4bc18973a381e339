"""ERNIE-Image: one stream, [image, text], held as [pos batch d_model].

Source: `ErnieImageTransformer2DModel` and `ErnieImageSingleStreamAttnProcessor` (diffusers 0.42).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel

from .adapter import Family
from .blocks import Write, one_stream, width_sizes
from .layout import Layout, ordered, patches
from .samples import normal, patch_pixels, times


def layout(live: Any, given: Mapping[str, Any]) -> Layout:
    lengths = given["text_lens"]
    mask = torch.arange(given["text_bth"].shape[1], device=lengths.device) < lengths[:, None]
    return ordered(patches(live, given), mask, "image")


def inputs(transformer: Any) -> dict[str, Any]:
    return {
        "hidden_states": patch_pixels(transformer, transformer.config.in_channels),
        "timestep": times(transformer),
        "text_bth": normal(transformer, 2, 5, transformer.config.text_in_dim),
        "text_lens": torch.tensor([5, 3], device=transformer.device),
    }


def small() -> Any:
    size = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "rope_axes_dim": (4, 6, 6),
    }
    return ErnieImageTransformer2DModel(
        in_channels=4, out_channels=4, patch_size=1, text_in_dim=12, **size
    )


BLOCKS = one_stream("layers", "self_attention", enters="x", mlp_out="mlp")
WRITES = {**BLOCKS.writes, "mlp_out_pre_gate": Write("mlp", ("joint",), axes="pos batch d")}


def latents(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    sides = (arguments.get(side, 1024) // pipe.vae_scale_factor for side in ("height", "width"))
    return (pipe.transformer.config.in_channels, *sides)


FAMILY = Family(
    name="ERNIE-Image",
    transformer="ErnieImageTransformer2DModel",
    blocks=(replace(BLOCKS, writes=WRITES, axes="pos batch d"),),
    layout=layout,
    inputs=inputs,
    small=small,
    sizes=width_sizes("num_attention_heads", "hidden_size"),
    text="text_bth",
    latents=latents,
)
